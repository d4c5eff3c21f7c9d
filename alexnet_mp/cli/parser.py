"""The command lines: every field of a configuration or request is a flag, made by tyro from the dataclasses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from alexnet_mp.config import Config
from alexnet_mp.config.arguments import EvaluateRequest, PackRequest, PredictRequest
from alexnet_mp.config.presets import preset
from alexnet_mp.parallel.launcher import launcher, restarts
from alexnet_mp.training.checkpoint import read_to_resume

LAST = "last"  # what `--resume` without a file stands for
FREE_ON_RESUME = {
    "epochs",
    "max_steps",
    "patience",
    "delta",
    "data_dir",
}  # besides everything of the machine and placement

Kind = TypeVar("Kind")

TRAIN = """Trains AlexNet in columns: `torchrun --nproc_per_node=2 launch/train.py [flags]` puts one column on each of two
GPUs (or CPU processes); `python launch/train.py [flags]` runs all columns on one device. Without flags: the demo preset on
generated images, no download. A preset is a complete configuration; any flag below changes one field of it."""

EVALUATE = """Measures trained networks: loss, top-1 and top-5 over a split's images. `python launch/evaluate.py --checkpoint
RUN/best.pt` repeats the test of the run in RUN, on one device or, under torchrun as for training, on several, whatever the
placement that trained it. --ten-crop averages ten views of each image, as the paper's figures do; several --checkpoint are
averaged as one network."""

PREDICT = """Names what is on images: `python launch/predict.py --checkpoint RUN/best.pt cat.jpg dog.png` shows the most
probable classes of each. Files that cannot be read are named, the others are shown, and the exit code is then 2."""

PACK = """Packs an image folder for fast training: `python launch/pack.py SOURCE STORE`, then `launch/train.py --data store --data-dir
STORE`. Shorter side 256, center 256x256, upright, RGB; images that are smaller keep their size. An interrupted command is repeated: it
goes on where it was, and the store is the same to the byte."""


class UsageError(ValueError):
    """A command line that cannot be; every rank sees the same one."""


def parse_train(argv: Sequence[str]) -> Config:
    """The configuration that `argv` asks for. UsageError with one line naming the flag; SystemExit(0) after --help."""
    argv = [
        word for word in argv if not re.fullmatch("--local[-_]rank=[0-9]+", word)
    ]  # torch.distributed.launch's; it is in the environment too
    if "--resume" in argv:  # its value is optional, which tyro does not know
        at = argv.index("--resume") + 1
        if at == len(argv) or argv[at].startswith("--"):
            argv.insert(at, LAST)
    argv = _continued(argv)
    with _usage_errors():
        base, checkpoint = _base(argv)
        # --resume has been read: what the flags change must not be changed back by it.
        config = _tyro(Config, argv, TRAIN, base).with_fields(resume=base.run.resume)
    if checkpoint:
        _refuse_changes(config, base, checkpoint)
    return config


def _continued(argv: list[str]) -> list[str]:
    """`argv`, continuing OUT/last.pt where torchrun (--max-restarts) starts ranks again whose job has written it."""
    out = value_of(argv, "--out")
    if not restarts() or not out or not Path(out, "last.pt").exists():
        return argv
    try:
        wrote = json.loads(Path(out, "config.json").read_text(encoding="utf-8"))["environment"][
            "launcher"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return argv
    if wrote != launcher():
        return argv  # another run's folder, which the first start has refused too
    kept = [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if "--resume" not in (before, word.partition("=")[0])
    ]
    return [*kept, "--resume", str(Path(out, "last.pt"))]


def parse_evaluate(argv: Sequence[str]) -> EvaluateRequest:
    """What `argv` asks of evaluate.py; `--checkpoint A B` is `--checkpoint A --checkpoint B`. Raises as `parse_train`."""
    return parse_request(EvaluateRequest, _repeated(argv, ("--checkpoint", "--weights")), EVALUATE)


def parse_predict(argv: Sequence[str]) -> PredictRequest:
    """What `argv` asks of predict.py; what follows a flag's value is an image. Raises as `parse_train`."""
    return parse_request(PredictRequest, list(argv), PREDICT)


def parse_pack(argv: Sequence[str]) -> PackRequest:
    """What `argv` asks of pack.py. Raises as `parse_train`."""
    return parse_request(PackRequest, list(argv), PACK)


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The last value of `flag` in `argv`, written `--flag value` or `--flag=value`."""
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
    return value


def _base(argv: list[str]) -> tuple[Config, Path | None]:
    """What the flags change: a preset, or the configuration of the checkpoint that the run continues from."""
    name, resume, out = (value_of(argv, flag) for flag in ("--preset", "--resume", "--out"))
    if resume is None:
        return preset(name or "demo"), None
    if resume == LAST and not out:
        raise ValueError(
            "--resume alone means OUT/last.pt: name the run's folder with --out, or the file with --resume FILE"
        )
    path = Path(out or "", "last.pt") if resume == LAST else Path(resume)
    stored = stored_config(path)
    if name is not None and name != stored.preset:
        raise ValueError(
            f"--preset {name}: {path} was trained with --preset {stored.preset}; leave the flag out to continue it"
        )
    return stored.with_fields(
        resume=str(path),
        out=out or str(path.parent),
        device="auto",
        backend="auto",
        threads=0,
        workers=0,
        column_ranks=0,
        timeout=60.0,
        compile=False,
        cuda_graphs=False,
        deterministic=False,
        max_steps=0,
        profile=False,
    ), path


def stored_config(path: Path) -> Config:
    """The configuration of the run that wrote the checkpoint `path`."""
    content = read_to_resume(path)
    try:
        return Config.from_dict(content["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}") from None


def _refuse_changes(config: Config, stored: Config, path: Path) -> None:
    for part in ("model", "data", "recipe"):
        for name, value in vars(getattr(config, part)).items():
            before = getattr(getattr(stored, part), name)
            if value != before and name not in FREE_ON_RESUME:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: {path} was trained with {before}; leave the flag out to continue it, "
                    "or start a new run without --resume"
                )
    for name in ("seed", "precision"):
        value, before = getattr(config.run, name), getattr(stored.run, name)
        if value != before:
            raise UsageError(
                f"--{name} {value}: {path} was trained with {before}; leave the flag out to continue it"
            )


def parse_request(kind: type[Kind], argv: list[str], description: str) -> Kind:
    """What `argv` asks for, as a `kind`, which has a field `json`. Raises as `parse_train`."""
    with _usage_errors():
        request = _tyro(kind, argv, description)
        if is_main_process():
            _check_writable(request.json)
    return request


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """What goes wrong inside is a mistake in the command line."""
    try:
        yield
    except BrokenPipeError:  # whoever read the help has gone; guarded knows
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _check_writable(target: str) -> None:
    """Says before the work, not after it, that its result could not be written."""
    path = Path(target).absolute()
    if target in ("", "-"):
        return
    if path.is_dir():
        raise ValueError(f"--json {target}: a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(
            f"--json {target}: cannot be written"
            + ("" if path.parent.is_dir() else f", there is no folder {path.parent}")
        )


def _repeated(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`argv` with each of `flags` before every one of its values: `--checkpoint A B` becomes `--checkpoint A --checkpoint B`."""
    words: list[str] = []
    flag = None
    for before, word in zip(["", *argv], argv, strict=False):
        if word.startswith("--"):
            flag = name if (name := word.partition("=")[0]) in flags else None
        elif flag and before != flag:
            words.append(flag)
        words.append(word)
    return words


def _tyro(kind: type[Kind], argv: list[str], description: str, default: Kind | None = None) -> Kind:
    """Tyro's reading of `argv` as a `kind`, whose fields are `default`'s where no flag says otherwise; its boxed message becomes one line."""
    message = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[kind],
                args=argv,
                prog=Path(sys.argv[0]).name,
                description=description,
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(message.getvalue())) from None


def _one_line(box: str) -> str:
    """The first paragraph of tyro's box, without its frame."""
    words = []
    for line in box.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╰╮╯─ \n")
        if not text:
            break
        words.append(text)
    return (
        re.sub(r"^Error parsing \w+: ", "", " ".join(words)).replace("Error parsing ", "")
        + " (--help lists the flags)"
    )


def is_main_process() -> bool:
    """Whether this process should say what all ranks know (before any group exists)."""
    return os.environ.get("RANK", "0") == "0"
