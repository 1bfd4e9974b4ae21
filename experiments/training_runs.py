"""Table 6 of the DiCo paper: its main runs. `python experiments/training_runs.py --table 6 --rows DiCo-S --protocol imagenet256`.

A run's length and batch are its protocol's: imagenet256 for DiCo-S, B and L (and DiT-XL/2 beside them), imagenet256_3750k
and imagenet512_3000k for DiCo-XL, imagenet256_h for DiCo-H. `slurm/<run>.sh` sends one to a cluster.
"""

from __future__ import annotations

from experiments.ablation import SMALL_DIT, SMALL_U
from experiments.engine.cli import main
from experiments.engine.spec import Backbone, Row, Table

TABLE_6 = Table(
    number=6,
    title="Training settings",
    source="DiCo paper, Table 6",
    published="table1.csv",
    key=("group", "model"),
    rows=(
        Row("DiCo-S", Backbone("dico_s"), SMALL_U, "S DiCo-S"),
        Row("DiCo-B", Backbone("dico_b"), SMALL_U, "B DiCo-B"),
        Row("DiCo-L", Backbone("dico_l"), SMALL_U, "L DiCo-L"),
        Row("DiCo-XL", Backbone("dico_xl"), SMALL_U, "XL DiCo-XL"),
        Row("DiCo-H", Backbone("dico_h"), SMALL_U, None),
        Row("DiT-XL/2", Backbone("dit_xl_2"), SMALL_DIT, "XL DiT-XL/2"),
    ),
)

TABLES = {6: TABLE_6}

if __name__ == "__main__":
    raise SystemExit(main(TABLES, __doc__))
