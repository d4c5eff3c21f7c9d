"""The table of faults: what strikes whom where, and what must come of it."""

from __future__ import annotations

from harness import Scenario

DIED, STOPPED = "rank 1 died", "its process is stopped"
SILENT = (1, None)  # rank 0 ends, the stopped rank is still there
SAVED = "saved; continue with the same command"

PEERS = [
    # A rank is killed. The other one is gone within ten seconds and says who it was.
    Scenario(
        "killed before the ranks meet",
        "kill@arrive",
        codes=(2, -9),
        words="waited 6 s for rank 1, which did not start",
    ),
    *[
        Scenario(f"killed at the {point}", f"kill@{point}", words=DIED, last=last)
        for point, last in [
            ("handshake", None),
            ("groups", None),
            ("data", None),
            ("batch", None),
            ("step:1", None),
            ("step:5", 3),
            ("exchange:6", None),
            ("flags:2", None),
            ("update:5", 3),
            ("validation:2", 3),
            ("save:2", 3),
            ("test", 6),
        ]
    ],
    Scenario(
        "rank 0 killed at a step", "kill@step:5", rank=0, codes=(-9, 1), words="rank 0 died", last=3
    ),
    Scenario(
        "rank 0 killed in the middle of writing",
        "kill@write:2",
        rank=0,
        codes=(-9, 1),
        words="rank 0 died",
        last=3,
    ),
    Scenario(
        "rank 0 killed while the others wait for its data",
        "kill@packing",
        rank=None,
        codes=(-9, 1),
        words="rank 0 died",
    ),
    Scenario(
        "rank 0 killed at the plot",
        "kill@plot",
        rank=0,
        codes=(-9, 0),
        words="",
        once=False,
        last=6,
    ),
    Scenario(
        "rank 0 killed, and with it the store",
        "kill@step:5",
        rank=0,
        codes=(-9, 1),
        words="rank 0 died",
        keeps_store=False,
        last=3,
    ),
    Scenario(
        "rank 1 killed where rank 0 keeps the store",
        "kill@step:5",
        words=DIED,
        keeps_store=False,
        last=3,
    ),
    Scenario(
        "one of four killed",
        "kill@step:2",
        rank=2,
        codes=(1, 1, -9, 1),
        words="rank 2 died",
        world=4,
        flags=("--epochs", "1"),
    ),
    # A rank of another host: its process cannot be looked for, but its connection closes.
    Scenario(
        "killed on another host",
        "kill@step:5",
        hosts=2,
        words="rank 1 died: its process",
        last=3,
    ),
    Scenario(
        "killed on another host while the peer waits as in NCCL",
        "kill@exchange:3",
        hosts=2,
        peers_fault="slow:60@exchange:3",
        words="on node1 ended without a word",
    ),
    Scenario(
        "a host of two killed, and with it half of the ranks",
        "kill@step:2",
        rank=2,
        whole_host=True,
        hosts=2,
        world=4,
        codes=(1, 1, -9, -9),
        words="on node1 ended without a word",
        flags=("--epochs", "1"),
    ),
    Scenario(
        "the host of rank 0 killed, and with it the store",
        "kill@step:5",
        rank=0,
        hosts=2,
        codes=(-9, 1),
        words="rank 0 died",
        keeps_store=False,
        last=3,
    ),
    Scenario(
        "frozen on another host",
        "stop@step:5",
        hosts=2,
        codes=SILENT,
        words="on node1); last seen",
        within=9,
        last=3,
    ),
    Scenario("ended without a word", "exit@step:2", codes=(1, 7), words=DIED),
    # A rank is frozen: noticed by its silence within --timeout (6 s here).
    *[
        Scenario(
            f"frozen at the {point}",
            f"stop@{point}",
            codes=SILENT,
            words=STOPPED,
            within=9,
            last=last,
        )
        for point, last in [
            ("handshake", None),
            ("data", None),
            ("step:5", 3),
            ("exchange:6", None),
            ("validation:2", 3),
            ("save:2", 3),
        ]
    ],
    Scenario(
        "rank 0 frozen at a step",
        "stop@step:5",
        rank=0,
        codes=(None, 1),
        words="rank 0 has been silent",
        within=9,
        last=3,
    ),
    Scenario(
        "rank 0 frozen in the middle of writing",
        "stop@write:2",
        rank=0,
        codes=(None, 1),
        words="rank 0 has been silent",
        within=9,
        last=3,
    ),
    Scenario(
        "rank 0 frozen while the others wait for its data",
        "stop@packing",
        rank=None,
        codes=(None, 1),
        words="rank 0 has been silent",
        within=9,
    ),
    # A rank raises: its cause is the one that is said.
    *[
        Scenario(
            f"fault of the program's at the {point}",
            f"raise@{point}",
            codes=(1, 1),
            words="rank 1: RuntimeError: injected fault",
        )
        for point in ("data", "step:2", "exchange:3", "validation", "save")
    ],
    Scenario(
        "fault of the program's on rank 0",
        "raise@step:2",
        rank=0,
        codes=(1, 1),
        words="rank 0: RuntimeError: injected fault",
    ),
    *[
        Scenario(
            f"fault of the program's while the peer waits as in NCCL, on rank {rank}",
            "raise@exchange:3",
            rank=rank,
            # NCCL's wait does not fail when a peer is gone; nor does this one, where gloo's would
            peers_fault="slow:60@exchange:3",
            codes=(1, 1),
            words=f"rank {rank}: RuntimeError: injected fault",
        )
        for rank in (0, 1)
    ],
    Scenario(
        "an unreadable file while the peers wait as in NCCL",
        "value@exchange:3",
        rank=2,
        world=4,
        peers_fault="slow:60@exchange:3",
        codes=(1, 1, 2, 1),
        words="rank 2: x.jpg: injected fault",
    ),
    Scenario(
        "an unreadable file on one rank",
        "value@data",
        codes=(1, 2),
        words="rank 1: x.jpg: injected fault",
    ),
    Scenario(
        "an unreadable file on one rank of four",
        "value@data",
        rank=3,
        codes=(1, 1, 1, 2),
        words="rank 3: x.jpg: injected fault",
        world=4,
    ),
    Scenario(
        "an error while the others wait",
        "value@packing",
        rank=None,
        codes=(2, 2),
        words="error: x.jpg: injected fault",
    ),
    Scenario(
        "out of device memory",
        "oom@step:2",
        codes=(1, 1),
        words="rank 1: out of memory: CUDA out of memory",
    ),
    Scenario("out of host memory", "memory@data", codes=(1, 1), words="rank 1: out of memory"),
    # A rank works long: nobody is declared dead.
    Scenario(
        "one rank works on the data for longer than --timeout",
        "slow:4@packing",
        rank=None,
        codes=(0, 0),
        words="test: loss",
        within=20,
        flags=("--timeout", "2", "--epochs", "1"),
    ),
    Scenario(
        "saving takes longer than --timeout",
        "slow:4@write",
        rank=0,
        codes=(0, 0),
        words="test: loss",
        within=20,
        flags=("--timeout", "2", "--epochs", "1"),
    ),
    Scenario(
        "the plot takes longer than --timeout",
        "slow:4@plot",
        rank=0,
        codes=(0, 0),
        words="test: loss",
        within=20,
        flags=("--timeout", "2", "--epochs", "1"),
    ),
    Scenario(
        "a slow step",
        "slow:2@step:2",
        codes=(0, 0),
        words="test: loss",
        within=20,
        flags=("--epochs", "1"),
    ),
]

DISAGREEMENTS = [
    Scenario(
        "another seed",
        codes=(2, 2),
        rank_flags={1: ("--seed", "1")},
        words="rank 1 differs from rank 0 in --seed: 0 on rank 0, 1 on rank 1",
    ),
    Scenario(
        "another rate",
        codes=(2, 2),
        rank_flags={1: ("--lr", "0.5")},
        words="in --lr: 0.01 on rank 0, 0.5 on rank 1",
    ),
    Scenario(
        "another batch size",
        codes=(2, 2),
        rank_flags={1: ("--batch-size", "4")},
        words="in --batch-size: 8 on rank 0, 4 on rank 1",
    ),
    Scenario(
        "another network",
        codes=(2, 2),
        rank_flags={1: ("--hidden", "6", "9")},
        words="rank 1 differs from rank 0 in --hidden",
    ),
    Scenario(
        "another precision",
        codes=(2, 2),
        rank_flags={1: ("--precision", "bf16")},
        words="in --precision: fp32 on rank 0, bf16 on rank 1",
    ),
    Scenario(
        "another folder",
        codes=(2, 2),
        rank_flags={1: ("--out", "/tmp/elsewhere")},
        words="rank 1 differs from rank 0 in --out",
    ),
    Scenario(
        "another version of the code",
        differs="code",
        codes=(2, 2),
        words="rank 1 differs from rank 0 in code",
    ),
    Scenario(
        "another version of torch",
        differs="torch",
        codes=(2, 2),
        words="rank 1 differs from rank 0 in torch",
    ),
    Scenario(
        "other images", differs="data", codes=(2, 2), words="rank 1 has other data than rank 0"
    ),
    Scenario(
        "another order of the first batch",
        "reverse@batch",
        codes=(2, 2),
        words="rank 1 was given another first batch than rank 0",
    ),
    Scenario(
        "another world size",
        codes=(2, 2),
        environment={"RANK1_WORLD_SIZE": "4"},
        once=False,
        words="rank 1 was started with WORLD_SIZE=4, rank 0 with 2",
    ),
    Scenario(
        "a garbled message at the handshake",
        differs="message",
        codes=(2, 2),
        words="rank 1 sent an invalid handshake; check that all ranks run the same version",
    ),
]

SIGNALS = [
    *[
        Scenario(
            f"SIG{kind.upper()} to all ranks at the {point}",
            f"{kind}@{point}",
            rank=None,
            codes=(code, code),
            words=SAVED,
            last=last,
        )
        for kind, code in (("term", 143), ("int", 130), ("usr1", 138))
        for point, last in (("step:5", 5),)
    ],
    Scenario("SIGTERM to one rank only", "term@step:5", codes=(143, 143), words=SAVED, last=5),
    Scenario(
        "SIGTERM in an epoch's last step",
        "term@step:3",
        rank=None,
        codes=(143, 143),
        words=SAVED,
        last=3,
    ),
    Scenario(
        "SIGTERM in the validation",
        "term@validation",
        rank=None,
        codes=(143, 143),
        words=SAVED,
        last=3,
    ),
    Scenario("SIGTERM while saving", "term@save", rank=None, codes=(143, 143), words=SAVED, last=4),
    Scenario("SIGTERM in the test", "term@test", rank=None, codes=(143, 143), words=SAVED, last=6),
    Scenario(
        "SIGTERM while the data is loaded",
        "term@data",
        rank=None,
        codes=(-15, -15),
        words="",
        once=False,
    ),
    Scenario(
        "SIGINT twice",
        "int2@step:5",
        rank=None,
        codes=(130, 130),
        words="",
        once=False,
        last=3,
        within=5,
    ),
]

FILES = [
    Scenario(
        "a full disk at a save",
        "full@write:2",
        rank=0,
        codes=(2, 2),
        words="No space left on device); the one before it is intact",
        last=3,
    ),
    Scenario(
        "a limit on the size of files",
        "limit:20000@save:2",
        rank=0,
        codes=(2, 2),
        words="File too large); the one before it is intact",
        last=3,
    ),
    Scenario(
        "a full disk at the history",
        "full@history:2",
        rank=0,
        codes=(2, 2),
        words="No space left on device",
        last=3,
    ),
    Scenario(
        "the folder vanishes",
        "vanish:OUT@validation:2",
        rank=0,
        codes=(2, 2),
        words="best.pt: no such checkpoint",
        last=6,
    ),
    Scenario(
        "a plot that cannot be drawn",
        "value@plot",
        rank=0,
        codes=(0, 0),
        words="curves.png could not be drawn",
        last=6,
    ),
    Scenario(
        "a folder that cannot be made",
        codes=(2, 2),
        flags=("--out", "/proc/run"),
        words="--out /proc/run",
    ),
    Scenario(
        "killed between last.pt and best.pt, one rank",
        "kill@link",
        rank=0,
        world=1,
        codes=(-9,),
        words="",
        once=False,
        last=3,
    ),
    Scenario(
        "killed before the rename, one rank",
        "kill@rename:5",
        rank=0,
        world=1,
        codes=(-9,),
        words="",
        once=False,
        last=3,
    ),
    Scenario(
        "killed in the middle of writing, one rank",
        "kill@write:2",
        rank=0,
        world=1,
        codes=(-9,),
        words="",
        once=False,
        last=3,
    ),
]

NUMBERS = [
    Scenario(
        "a gradient that is no number on one rank",
        "nan@flags:5",
        codes=(1, 1),
        last=4,
        words="step 5 (epoch 2): the gradient of columns.1.fc8.weight on rank 1 is not finite",
    ),
    Scenario(
        "a message of infinities",
        "garble@exchange:19",
        codes=(1, 1),
        words="step 5 (epoch 2): the loss on every rank is not finite",
        last=4,
    ),
    Scenario(
        "a rate that explodes",
        codes=(1, 1),
        flags=("--lr", "1e20"),
        words="is not finite, so the step was not taken",
        within=30,
    ),
]

SCENARIOS = PEERS + DISAGREEMENTS + SIGNALS + FILES + NUMBERS
