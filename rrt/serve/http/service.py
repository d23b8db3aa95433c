"""What the paths of a server share."""

from collections.abc import Callable
from dataclasses import dataclass

from rrt.data.tokenizer import Tokenizer
from rrt.serve.exits import ExitPolicy
from rrt.serve.http.metrics import Metrics
from rrt.serve.http.protocol import Limits
from rrt.serve.http.worker import Worker


@dataclass(frozen=True)
class Service:
    """What the application serves.

    Attributes:
        model_name: by which clients name the model.
        policy_name: of the exit policy at the start, as the flag has it.
        parse_policy: makes the policy of a name.
        api_key: that clients must send; None: none.
    """

    worker: Worker
    tokenizer: Tokenizer
    metrics: Metrics
    limits: Limits
    model_name: str
    policy_name: str
    parse_policy: Callable[[str], ExitPolicy]
    api_key: str | None
