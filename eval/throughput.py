"""The paper's throughput study on this machine: python eval/throughput.py --preset pythia-160m --max-batch 16

1. Measures how long embedding, block, head and the rest of a pass take, over batch sizes, for the vanilla model and for
   recursive ones of each --lora-rank, with dummy weights.
2. Takes samples and each token's exit from recordings of eval/exits.py (--trajectories), or draws them (--mean-loops,
   --length-scale).
3. Simulates static batching and continuous sequence-wise batching (CSB) of the vanilla model, and CSB and continuous
   depth-wise batching (CDB) with those exits of the recursive ones, over a queue of --samples samples.

Every figure is given as the paper counts (blocks only), then with one more cost at a time: embedding and head; the LoRA
of rows at different loops; the keys and values of skipped loops; a head in every pass, as an exit by confidence needs;
the prompts. One recording stands for all ranks; for a model's own exits, record that model.

    python eval/throughput.py --paper    # the paper's own block times through the same simulation, beside its results
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.flags import add_device_flag, check_least, check_output_file
from eval.paper_study import repeat_study
from eval.paper_study import tables as paper_tables
from eval.pass_times import batch_sizes, cost_stages, dummy_model, measure_pass, measure_prefill
from eval.simulate import Queue, depth_wise, draw_lengths, sequence_wise, static, time_of
from eval.tables import Table, format_seconds, print_tables
from eval.trajectories import read_trajectories
from rrt.checkpoint.presets import PRESETS, preset, preset_dtype
from rrt.checkpoint.source import open_source
from rrt.common.cli import CommandParser, human_bytes, human_count, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.machine import free_memory_bytes
from rrt.common.processes import pick_device
from rrt.common.results import write_result
from rrt.errors import UserError
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.sizes import Sizes, model_sizes

CDB = "CDB, oracle"


@dataclass(frozen=True)
class Setting:
    """Prompt and generated tokens of a sample, and bytes for weights, keys and values (0: all that are free)."""

    prefix: int
    decode: int
    memory: int

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Parse `512/2048` or `64/256@16`, the memory in GiB."""
        lengths, _, gib = text.partition("@")
        try:
            prefix, decode = map(int, lengths.split("/"))
            memory = int(float(gib) * 2**30) if gib else 0
        except ValueError:
            prefix, decode, memory = 0, 0, 0
        if prefix < 1 or decode < 1 or memory < 0:
            raise UserError(f"--settings: found {text!r}; expected PREFIX/DECODE or PREFIX/DECODE@GIB, like 64/256@16")
        return cls(prefix, decode, memory)

    def __str__(self) -> str:
        return f"{self.prefix}/{self.decode}" + (f", {human_bytes(self.memory)}" if self.memory else "")


def largest_batch(sizes: Sizes, setting: Setting, memory: int, limit: int) -> int:
    """Return how many sequences fit beside the weights at their full length, at most `limit`.

    Raises:
        UserError: not even one does.
    """
    each = sizes.kv_bytes_per_token * (setting.prefix + setting.decode)
    fitting = (memory - sizes.bytes) // each
    if fitting < 1:
        raise UserError(
            f"memory: {human_bytes(memory)} hold no sequence of {setting}: weights take {human_bytes(sizes.bytes)}, "
            f"keys and values {human_bytes(each)}; name a smaller model or more memory"
        )
    return min(limit, int(fitting))


def make_queues(arguments: argparse.Namespace, decode: int) -> dict[str, Queue]:
    """Make queues of --samples samples of at most `decode` tokens, by name."""
    queues = {}
    for mean in arguments.mean_loops:
        lengths = draw_lengths(arguments.samples, decode, arguments.length_scale)
        queues[f"{mean} loops"] = Queue.draw(lengths, arguments.num_loops, mean)
    for directory in arguments.trajectories:
        recorded, _, meta = read_trajectories(directory)
        if recorded.num_loops != arguments.num_loops:
            raise UserError(
                f"{directory}: field 'num_loops': found {recorded.num_loops}; expected {arguments.num_loops}, as "
                "--num-loops says"
            )
        queue = resample(recorded.lengths, recorded.oracle_exits(), arguments.num_loops, arguments.samples, decode)
        queues[f"{directory.name} ({meta['data']})"] = queue
    return queues


def resample(lengths: np.ndarray, exits: np.ndarray, num_loops: int, samples: int, decode: int) -> Queue:
    """Draw a queue from recorded samples with replacement; each sample is cut at `decode` tokens."""
    begins = np.cumsum(lengths) - lengths
    chosen = np.random.default_rng(0).integers(len(lengths), size=samples)
    cut = np.minimum(lengths[chosen], decode).astype(np.int64)
    offsets = np.arange(cut.sum()) - np.repeat(np.cumsum(cut) - cut, cut)
    return Queue(cut, exits[np.repeat(begins[chosen], cut) + offsets].astype(np.int8), num_loops)


@dataclass(frozen=True)
class ModelSpec:
    """A model to measure; rank None is the vanilla one."""

    setting: Setting
    rank: int | None
    recursion: RecursiveConfig
    sizes: Sizes
    limit: int
    """Most sequences in a batch."""


def make_spec(arguments: argparse.Namespace, config: ModelConfig, setting: Setting, rank: int | None) -> ModelSpec:
    """Size a model and its largest batch before it is built.

    Raises:
        UserError: the rank or number of loops is not possible, or no sequence fits beside the weights.
    """
    device = arguments.torch_device
    recursion = RecursiveConfig()
    if rank is not None:
        recursion = RecursiveConfig(num_loops=arguments.num_loops, lora_rank=LoraRanks.uniform(rank))
    sizes = model_sizes(config, recursion, arguments.torch_dtype)
    free = free_memory_bytes(device)
    if device.type == "cpu":
        free -= sizes.bytes  # decoding keeps packed copies of the weights
    memory = min(setting.memory or free, free)
    return ModelSpec(setting, rank, recursion, sizes, largest_batch(sizes, setting, memory, arguments.max_batch))


def measure(arguments: argparse.Namespace, config: ModelConfig, spec: ModelSpec) -> dict[str, Any]:
    """Build a model with dummy weights and measure its pass times."""
    device, dtype, setting = arguments.torch_device, arguments.torch_dtype, spec.setting
    recursion, sizes, limit = spec.recursion, spec.sizes, spec.limit
    name = "vanilla" if spec.rank is None else f"rank {spec.rank}"
    model = dummy_model(config, recursion, dtype, device)
    # The middle of the generation.
    length, times, stopped = setting.prefix + setting.decode // 2, [], None
    for rows in tqdm(batch_sizes(limit), desc=f"{setting}: {name}", unit="batch", disable=None, leave=False):
        try:
            times.append(measure_pass(model, rows, length, arguments.seconds))
        except torch.OutOfMemoryError:
            if not times:
                raise UserError(f"memory: {setting}: {name} does not fit on {device}; name a smaller model") from None
            stopped = f"out of memory at {rows}"
            break
    return {
        "model": name,
        "rank": spec.rank,
        "num_loops": recursion.num_loops,
        "non_embedding_params": sizes.non_embedding_params,
        "batch": times[-1].rows,
        "batch_limit": stopped or ("--max-batch" if limit == arguments.max_batch else "memory"),
        "prefill": measure_prefill(model, setting.prefix, arguments.seconds),
        "times": times,
    }


def simulate(models: list[dict[str, Any]], queue: Queue) -> list[dict[str, Any]]:
    """Simulate every model and strategy: tokens per second at each stage of counting, and over the vanilla baselines.

    Of a row, `over_static` and `over_csb` are its ratios to static batching and to CSB of the vanilla model.
    """
    rows = []
    for model in models:
        own = queue if model["num_loops"] > 1 else queue.without_exits(1)
        slots = model["batch"]
        runs = {"CSB": sequence_wise(own, slots)}
        if model["num_loops"] > 1:
            runs[CDB] = depth_wise(own, slots)
        else:
            runs = {"static": static(own, slots), **runs}
        for strategy, passes in runs.items():
            row: dict[str, Any] = {"model": model["model"], "strategy": strategy, "batch": slots, "counted": {}}
            for counted, costs in cost_stages(model["times"], model["num_loops"], model["prefill"]):
                if strategy != CDB:  # no token may leave before the last loop: the head has nothing to look at
                    costs = replace(costs, head_everywhere=False)
                seconds = time_of(passes, costs, len(own.lengths))
                row["counted"][counted] = {"tokens_per_second": own.num_tokens / seconds.total, **asdict(seconds)}
            rows.append(row)
    for strategy in ("static", "CSB"):
        baseline = next(row for row in rows if (row["model"], row["strategy"]) == ("vanilla", strategy))
        for row in rows:
            row[f"over_{strategy.lower()}"] = {
                stage: counted["tokens_per_second"] / baseline["counted"][stage]["tokens_per_second"]
                for stage, counted in row["counted"].items()
            }
    return rows


def times_table(setting: dict[str, Any], title: str) -> Table:
    """Make the table of milliseconds per token of each part of a pass, by model and rows of the pass."""
    parts = ("embed", "block", "mixed", "kv_only", "head")
    rows = [
        [
            model["model"],
            str(point["rows"]),
            *("" if point[part] is None else f"{1e3 * point[part] / point['rows']:.4f}" for part in parts),
        ]
        for model in setting["models"]
        for point in model["times"]
    ]
    prompts = ", ".join(f"{model['model']} {format_seconds(model['prefill'])}" for model in setting["models"])
    limits = ", ".join(f"{model['model']} by {model['batch_limit']}" for model in setting["models"])
    notes = [f"A prompt takes: {prompts}.", f"Largest batch: {limits}."]
    header = ("model", "rows", "embedding", "block", "mixed loops", "skipped K/V", "head")
    return Table(f"{title}: ms per token", header, rows, gap_after=1, notes=notes)


def rates_table(queue: dict[str, Any], models: list[dict[str, Any]]) -> Table:
    """Make the table of tokens per second of blocks only, as the paper counts, then with further costs one by one."""
    sizes = {model["model"]: human_count(model["non_embedding_params"]) for model in models}
    paper, *more = queue["rows"][0]["counted"]
    rows = []
    for row in queue["rows"]:
        rates = {stage: counted["tokens_per_second"] for stage, counted in row["counted"].items()}
        ratios = (f"{row['over_static'][paper]:.2f}", f"{row['over_csb'][paper]:.2f}")
        cells = (f"{rates[stage]:,.0f} ({row['over_csb'][stage]:.2f})" for stage in more)
        name = row["model"]
        rows.append([name, row["strategy"], sizes[name], str(row["batch"]), f"{rates[paper]:,.0f}", *ratios, *cells])
    header = ("model", "strategy", "N-emb", "batch", paper, "/static", "/CSB", *(f"+ {stage}" for stage in more))
    title = (
        f"{queue['name']}: {queue['samples']:,} samples, {queue['tokens']:,} tokens, {queue['mean_loops']:.3f} loops "
        "per token; tokens/s, over the vanilla model's static batching and CSB; then (over its CSB)"
    )
    return Table(title, header, rows, (0, 1))


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the tables of pass times and simulated throughput of every setting."""
    made = []
    for setting in result["settings"]:
        lengths = Setting(setting["prefix"], setting["decode"], setting["memory"])
        made.append(times_table(setting, f"{result['subject']}, {lengths}, {result['dtype']}"))
        made += [rates_table(queue, setting["models"]) for queue in setting["queues"]]
    return made


def study(arguments: argparse.Namespace) -> None:
    """Measure, simulate and print; --json is written after every step."""
    subject = arguments.preset or arguments.checkpoint
    if arguments.preset is not None:
        config, stored = preset(arguments.preset), preset_dtype(arguments.preset)
    else:
        source = open_source(arguments.checkpoint)
        config, stored = source.model, source.dtype
    arguments.torch_dtype = chosen_dtype(arguments) or stored
    arguments.torch_device = pick_device(arguments.device)
    settings = [Setting.parse(text) for text in arguments.settings]
    if not arguments.trajectories and not arguments.mean_loops:
        arguments.mean_loops = [1 + 0.2 * (arguments.num_loops - 1)]
    # Read and sized before anything is measured, so that bad input ends here.
    queues = {setting: make_queues(arguments, setting.decode) for setting in settings}
    ranks = (None, *arguments.lora_rank)
    specs = {setting: [make_spec(arguments, config, setting, rank) for rank in ranks] for setting in settings}
    result: dict[str, Any] = {"kind": "throughput", "subject": str(subject), "complete": False, "settings": []}
    result |= {"num_loops": arguments.num_loops, "dtype": dtype_name(arguments.torch_dtype)}
    print(
        f"{subject}: pass times of {len(ranks)} models with dummy weights ({result['dtype']}) in {len(settings)} "
        f"setting(s), about {arguments.seconds:g} s for each batch size, then the simulation",
        flush=True,
    )
    for setting in settings:
        entry: dict[str, Any] = {**asdict(setting), "models": [], "queues": []}
        result["settings"].append(entry)
        models = []
        for spec in specs[setting]:
            models.append(measure(arguments, config, spec))
            entry["models"].append({**models[-1], "times": [asdict(point) for point in models[-1]["times"]]})
            save(arguments, result)
        print_tables([times_table(entry, f"{subject}, {setting}, {result['dtype']}")])
        for name, queue in queues[setting].items():
            summary = {"name": name, "samples": len(queue.lengths), "tokens": queue.num_tokens}
            summary |= {"mean_loops": queue.mean_loops, "rows": simulate(models, queue)}
            entry["queues"].append(summary)
            print_tables([rates_table(summary, models)])
            save(arguments, result)
    result["complete"] = True
    save(arguments, result)


def save(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    if arguments.json is not None:
        write_result(arguments.json, result, arguments.torch_device)


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--preset", choices=tuple(PRESETS), help="shapes of a published base model")
    subject.add_argument("--checkpoint", type=Path, metavar="DIR", help="shapes of this model's base")
    subject.add_argument("--paper", action="store_true", help="simulate from the paper's block times; measures nothing")
    parser.add_argument(
        "--num-loops", type=int, default=2, metavar="B", help="loops of the recursive models (default 2)"
    )
    parser.add_argument(
        "--lora-rank", type=int, nargs="+", default=[0, 64], metavar="R", help="recursive models' ranks (default 0 64)"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["512/2048", "64/256@16"],
        metavar="PREFIX/DECODE[@GIB]",
        help="prompt and generated tokens, and memory for weights and K/V (default 512/2048 and 64/256@16)",
    )
    parser.add_argument(
        "--trajectories", type=Path, nargs="+", default=[], metavar="DIR", help="recordings of eval/exits.py"
    )
    parser.add_argument(
        "--mean-loops", type=float, nargs="+", default=[], metavar="M", help="draw exits with these means of loops"
    )
    parser.add_argument(
        "--length-scale",
        type=float,
        metavar="TOKENS",
        help="lengths of the samples of --mean-loops: exponential with this scale (default: all of them DECODE)",
    )
    parser.add_argument("--samples", type=int, default=20_000, metavar="N", help="samples of a queue (default 20,000)")
    parser.add_argument(
        "--max-batch", type=int, default=512, metavar="N", help="largest batch (default 512, or memory)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="time to measure each batch size for (default 1)"
    )
    add_dtype_flag(parser, "dtype of the dummy weights")
    add_device_flag(parser)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here, as it grows")
    arguments = parser.parse_args()
    check_output_file("--json", arguments.json)
    if arguments.paper:
        result = {"kind": "throughput-paper", "rows": repeat_study()}
        print_tables(paper_tables(result))
        if arguments.json is not None:
            write_result(arguments.json, result)
        return
    check_least("--samples", arguments.samples)
    check_least("--max-batch", arguments.max_batch)
    if arguments.num_loops < 2:
        raise UserError(
            f"--num-loops: found {arguments.num_loops}; expected at least 2 to compare with the vanilla model"
        )
    if arguments.length_scale is not None and not 0 < arguments.length_scale < math.inf:
        raise UserError(f"--length-scale: found {arguments.length_scale}; expected a positive number")
    if arguments.length_scale is not None and arguments.trajectories and not arguments.mean_loops:
        raise UserError("--length-scale: found with --trajectories, which have lengths; expected --mean-loops")
    for mean in arguments.mean_loops:
        if not 1 <= mean <= arguments.num_loops:
            raise UserError(f"--mean-loops: found {mean}; expected 1 to {arguments.num_loops}")
    study(arguments)


if __name__ == "__main__":
    run_command(main)
