"""An HTTP server in front of the engine: OpenAI's protocol, metrics, and a page that shows depth."""
