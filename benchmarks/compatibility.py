"""Run other people's attacks on ABS and write docs/compatibility.md.

    python benchmarks/compatibility.py [--out docs/compatibility.md] [--results compatibility.jsonl]

Each row has a time limit; an attack that hangs is stopped and the rest goes on. Finished rows are kept in the results
file: run the command again to go on, delete the file to begin anew. Needs

    pip install -e '.[attacks,third-party]'
    pip install --no-deps torchattacks adv-lib  # they require an old requests and a web server, but do without

What is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import random
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from third_party import BOUNDS, DISTRIBUTIONS, Bench, Outcome, Row, autoattack_warnings, measure, rows

from abs_defense import ABS, BinaryABS, load_model
from abs_defense.data import foolbox_digits

HEADER = """# Other people's attacks

Every attack below is called as its library documents it, on the torch module itself. The command, which runs them all
and writes this page:

```bash
pip install -e '.[attacks,third-party]'
pip install --no-deps torchattacks adv-lib
python benchmarks/compatibility.py
```

- Versions: {versions}.
- Model: `{model}`, and `Binary{model}` for attacks marked *binary*. Few prototypes and steps, so that all rows take
  about half an hour on one core.
- Images: the first {images} of foolbox's digits, all classified correctly. Starting points and targets, where an attack
  wants some, are the other digits and their classes.
- Settings are small, too (last column; others are the library's defaults). **The figures say what runs, not how robust
  ABS is**: for that see [results](results.md) and [evaluation](evaluation.md).
- Success: misclassified images, within the bound where the attack has one ({bounds}). Distance: their median, in the
  attack's norm, L2 where it has none. Both are computed anew from the images that the attack returns.
- Queries: images that the model saw for each attacked one.
- `Clipped(model)`: the attack predicts images outside [0, 1], see [other libraries](other-libraries.md).
- adv-lib imports torchvision and visdom for parts that no attack here uses; empty modules stand in where they are
  missing.

{summary}

"""

AUTOATTACK = """
## AutoAttack's warnings

AutoAttack looks for signs that its result may mislead. What it says, word for word, while a short run of APGD and
Square attacks (L2 {l2}) goes over the same images:

{table}

- **"it seems to be a dynamic defense"** does not appear, and ABS **is** one: it optimises latents for each image.
  AutoAttack counts the Python functions named `grad`, `backward` or `_make_grads` that run inside `forward`; the
  descent of ABS computes its gradients in closed form and calls none of them. Read the flag as set. It matters: the
  envelope gradient takes the latents as fixed, so attack with `gradient="unrolled"`, too, and with attacks that know
  the structure, such as `L2BisectorAttack` ([attacks](attacks.md)).
- **"it seems to be a randomized defense"** does not appear: prototypes are drawn once from a seed, and the same image
  has the same logits each time.
- **"points with zero gradient"** and **"Square Attack has decreased the robust accuracy"** would be true wherever they
  appear: gradients lead badly there, and an attack without gradients does better. On Binary ABS the gradient passes the
  threshold straight through (BPDA), which is an estimate, and AutoAttack does not say so. Attacks that know the
  threshold do better, by much where nobody takes back what the model does not see ([gradients](gradients.md)).
- With `gradient="none"` gradient attacks stop with an error instead of finding nothing.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/compatibility.md"))
    parser.add_argument("--results", type=Path, default=Path("compatibility.jsonl"))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--prototypes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one attack")
    parser.add_argument("--only", nargs="*", default=[], help="libraries or attacks to run; the page has all")
    args = parser.parse_args()
    size = {"images": args.images, "prototypes": args.prototypes, "steps": args.steps}
    catalogue = rows()
    found = _read(args.results)
    todo = [
        i
        for i, row in enumerate(catalogue)
        if _key(row, size) not in found and (not args.only or {row.library, row.name} & set(args.only))
    ]
    with contextlib.closing(_Worker(size, args.limit)) as worker, args.results.open("a") as file:
        for number, i in enumerate(todo, 1):
            row, started = catalogue[i], time.perf_counter()
            outcome = worker.run(i) if row.run else measure(row, _bench(**size))
            found[_key(row, size)] = outcome
            file.write(json.dumps([_key(row, size), outcome]) + "\n")
            file.flush()
            seconds = time.perf_counter() - started
            print(f"{number}/{len(todo)} {row.library} {row.name}: {outcome.status} ({seconds:.1f} s)", flush=True)
    done = [(row, found[_key(row, size)]) for row in catalogue if _key(row, size) in found]
    args.out.write_text(_page(done, size))
    print(args.out)


def _bench(images: int, prototypes: int, steps: int, *, binary: bool = False) -> Bench:
    digits = foolbox_digits().head(images)
    model = (BinaryABS if binary else ABS)(prototypes=prototypes, steps=steps, solver="adam")
    return Bench(model, digits.images.clone(), digits.labels.clone())


class _Worker:
    """A process that runs rows one by one; it is ended and replaced when a row takes too long."""

    def __init__(self, size: dict[str, int], limit: float) -> None:
        self.size, self.limit = size, limit
        self.process: Any = None
        self.pipe: Any = None

    def run(self, index: int) -> Outcome:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.size), daemon=True)
            self.process.start()
            theirs.close()
            self.pipe.recv()  # everything is imported
        self.pipe.send(index)
        if self.pipe.poll(self.limit):
            try:
                return Outcome(*self.pipe.recv())
            except EOFError:
                outcome = Outcome("fails", note="the process died")
        else:
            outcome = Outcome("stopped", note=f"not finished after {self.limit:g} s")
        self.close()
        return outcome

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _work(pipe: Connection, size: dict[str, int]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    catalogue = rows()
    benches = {binary: _bench(**size, binary=binary) for binary in (False, True)}
    pipe.send("ready")
    with Path(os.devnull).open("w") as nowhere:
        while True:
            try:
                row = catalogue[pipe.recv()]
            except EOFError:
                return
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                outcome = measure(row, benches[row.binary])
            pipe.send(tuple(outcome))


def _key(row: Row, size: dict[str, int]) -> str:
    fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "run"}
    return json.dumps([fields, size, _version(DISTRIBUTIONS[row.library])], default=str, sort_keys=True)


def _read(path: Path) -> dict[str, Outcome]:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {key: Outcome(*outcome) for key, outcome in lines}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _page(done: list[tuple[Row, Outcome]], size: dict[str, int]) -> str:
    names = ["abs-defense", "torch", "numpy", *DISTRIBUTIONS.values()]
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    counts = Counter(outcome.status for _, outcome in done)
    words = {"runs": "run", "fails": "fail", "does not apply": "do not apply", "stopped": "were stopped"}
    page = HEADER.format(
        versions=f"Python {platform.python_version()}, {versions}",
        model=f"ABS(prototypes={size['prototypes']}, steps={size['steps']}, solver='adam')",
        images=size["images"],
        bounds=", ".join(f"{norm} {bound:g}" for norm, bound in BOUNDS.items() if bound),
        summary=f"{len(done)} rows: " + ", ".join(f"{count} {words[status]}" for status, count in counts.items()) + ".",
    )
    for library in DISTRIBUTIONS:
        page += f"## {library}\n\n| attack | norm | runs | success | distance | queries | settings, remarks |\n"
        page += "|---|---|---|---|---|---|---|\n"
        page += "".join(_line(row, outcome, size) for row, outcome in done if row.library == library) + "\n"
    return page.rstrip() + "\n" + _autoattack(size)


def _line(row: Row, outcome: Outcome, size: dict[str, int]) -> str:
    status = {"runs": "yes", "fails": "**fails**", "does not apply": "no", "stopped": "stopped"}[outcome.status]
    success = "" if outcome.success is None else f"{outcome.success} of {size['images']}"
    settings = ", ".join(f"{key}={_short(value)}" for key, value in row.settings.items())
    remarks = [f"`{settings}`" if settings else "", "*binary*" if row.binary else "", outcome.note.replace("|", "\\|")]
    cells = [
        row.name,
        row.norm,
        status,
        success,
        "" if outcome.distance is None else f"{outcome.distance:.3g}",
        "" if outcome.queries is None else f"{outcome.queries:.0f}",
        "; ".join(filter(None, remarks)),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, (str, dict, list)) else str(value)


def _autoattack(size: dict[str, int]) -> str:
    if _version("pyautoattack") == "not installed":
        return ""
    few, bench = {"prototypes": size["prototypes"], "steps": size["steps"], "solver": "adam"}, _bench(**size)
    models = {
        "ABS": ABS(**few),
        'ABS, gradient="unrolled"': ABS(**few, gradient="unrolled"),
        'ABS, gradient="none"': ABS(**few, gradient="none"),
        "Binary ABS": BinaryABS(**few),
        "ABS without descent (`steps=0`)": ABS(prototypes=size["prototypes"], steps=0),
        "CNN": load_model("cnn"),
    }
    table = "| model | warnings |\n|---|---|\n"
    for name, model in models.items():
        torch.manual_seed(0)
        said = autoattack_warnings(model, bench.images, bench.labels)
        table += f"| {name} | {'<br>'.join(said) or 'none'} |\n"
    return AUTOATTACK.format(table=table.rstrip(), l2=f"{BOUNDS['L2']:g}")


if __name__ == "__main__":
    main()
