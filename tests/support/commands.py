from __future__ import annotations

import signal

TABLE = """
from dataclasses import replace
from experiments.declared import protocols
from experiments.engine.cli import main
from experiments.engine.specs.rows import Row, Table
from experiments.engine.specs.spec import Backbone

DIGITS = protocols.DIGITS
recipe = replace(DIGITS.recipe, steps={steps}, batch=8, warmup=1)
sampler = replace(DIGITS.sampler, num_steps=2)
protocols.PROTOCOLS["digits"] = replace(DIGITS, recipe=recipe, sampler=sampler, num=20)
tiny = dict(dim=8, depths=(1, 1, 1, 1, 1))
good = Row("good", Backbone("dico_s", tiny), {{}}, None)
bad = Row("bad", Backbone("hourglass", tiny | dict(mixer="window", heads=(1, 1, 1, 1, 1))), dict(mixer_options=dict(window=3)), None)
last = Row("last", Backbone("hourglass", tiny), {{}}, None)
table = Table(4, "tiny", "a test", "table4.csv", ("variant",), rows=(good, bad, last))

if __name__ == "__main__":
    raise SystemExit(main({{4: table}}, protocols.PROTOCOLS, "tiny"))
"""


def hear_interrupts() -> None:
    """A shell's background jobs, and what they start, are born deaf to them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
