"""What a run tells: its lines, its bar, its samples, and nothing of the libraries it uses.

  python -m pytest test_terminal.py
"""
import pytest

import convert
from test_convert import (  # noqa: F401  the fixtures are used by their names
    convert_main, diffusion, loss_by_hand, random_ids, random_lm, rows_of, run,
    train_step)

cases = pytest.mark.parametrize
BLOCKS = "--block_size=4 --distill_weight=0.7 --lm_loss_stages=123"


# ----------------------------------------------------------------------------------------------
# The parts of the loss
@cases("block_size, distill", [(0, 0), (4, 70.0)])
def test_each_part_of_the_loss_is_a_brute_force_sum(block_size, distill):
    model = diffusion(random_lm("llama"), "linear", 10, block_size=block_size)
    ids = random_ids(5, 12)
    noise = convert.sample_noise(5, 12, 0, block_size, 0.5 if block_size else 0)
    alone = loss_by_hand(model, ids, *noise, 0, 0).item()
    expected = [alone, loss_by_hand(model, ids, *noise, 0.5, 0).item() - alone,
                loss_by_hand(model, ids, *noise, 0, distill).item() - alone]
    assert min(expected[:2]) > 0.1 and (expected[2] > 0.01) == (distill > 0)
    for micro_batch, rows_of_head in ((1, 99), (2, 2), (5, 99)):
        model.head_floats = 99 * rows_of_head  # in chunks
        parts = train_step(model, ids, *noise, micro_batch, 0.5, distill, parts=True)
        assert parts == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_rows_have_the_parts_that_a_stage_has_and_they_sum_to_the_loss(run):
    out = run(f"{BLOCKS} --lm_loss_stages=3 --log_steps=2")
    rows = [row for row in rows_of("out") if "loss" in row]
    kinds = {row["stage"][0]: [k[5:] for k in row if k.startswith("loss_")] for row in rows}
    assert kinds == {"0": ["ar"], "1": ["diffusion", "distill"], "2": ["diffusion", "distill"],
                     "3": ["diffusion", "ar", "distill"]}
    for row in rows:
        parts = [x for k, x in row.items() if k.startswith("loss_")]
        assert sum(parts) == pytest.approx(row["loss"], rel=1e-6) and min(parts) > 0
    last = rows[-1]
    shown = " + ".join(f"{k} {last[f'loss_{k}']:.3f}" for k in kinds["3"])
    assert f"loss {last['loss']:.3f} ({shown})" in out
