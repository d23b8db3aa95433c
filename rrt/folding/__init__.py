"""From L layers to K shared ones that run B times, and back."""
