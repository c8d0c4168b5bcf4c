"""`describe` against texts written by hand."""

import textwrap

import jax
import numpy as np
import pytest

from spear_jax.core.errors import UserError
from spear_jax.models.attention import seen_in_tree
from spear_jax.packing.blocks import pack_step
from spear_jax.packing.debug import describe
from spear_jax.packing.rows import TrainingRow
from spear_jax.packing.shape_buckets import BlockShape

EOS = 2
PREFIX = (101, 102, 103)


def row(prompt, completion, label=1, weight=1.0, advantage=0.0):
    mask = np.ones(len(completion), bool)
    return TrainingRow(list(prompt), completion, mask, weight, label, advantage)


def shape(tokens, tiles, groups, shared_prefix=(), num_packs=1):
    return BlockShape(
        tokens, tiles, 16, groups, num_packs, num_packs, length=4, shared_prefix=shared_prefix
    )


def block_of(groups, shape):
    (block,) = pack_step([groups], shape)
    return block


def two_completions():
    win, lose = row([5, 6, 7], [8, 9, EOS]), row([5, 6, 7], [4, EOS], -1, 0.5)
    lose.loss_mask[-1] = False  # unlikelihood leaves the EOS alone
    return block_of([(win,), (lose,)], shape(16, ((2, 8),), 4))


def test_two_completions_of_one_prompt():
    assert describe(two_completions()) == textwrap.dedent("""\
        block of micro-batch 0: 2 of 4 rows, 5 of 16 scored tokens

        pack 0: 6 of 16 tokens, 62.5% padding; attention tiles 2 x 8, 62.5% padding

          tree 0
            prompt    5 6 7
            branch 1  8 9 [2]    row 0
            branch 2  4 [2]      row 1

            place               0  1  2  3  4  5
            token               5  6  7  8  9  4
            position            0  1  2  3  4  3
            branch_id           0  0  0  1  1  2
            query_index         0  1  2  3  4  5
            5 attends to        x
            6 attends to        x  x
            7 attends to        x  x  x
            8 attends to        x  x  x  x
            9 attends to        x  x  x  x  x
            4 attends to        x  x  x  .  .  x

          padding at places 6-15

        rows
          row 0: label +1, weight 1, advantage 0, loss on completion tokens 0-2 of 3
          row 1: label -1, weight 0.5, advantage 0, loss on completion tokens 0 of 2
          padding: rows 2-3
        """)


def test_a_shared_prefix_and_repeated_rows_stand_once():
    # 3 tokens of prefix; tree 0 has 3 + 2 + 1 + 0 tokens, tree 1 has 1 + 2. The queries of the
    # second tile go on behind the prefix's 3: from 3 for tree 0, from 3 + 8 for tree 1.
    rows = [
        row((*PREFIX, 5, 6, 7), [8, 9, EOS]),
        row((*PREFIX, 5, 6, 7), [4, EOS], -1),
        row((*PREFIX, 5, 6, 7), [4, EOS], -1),
        row((*PREFIX, 5, 6, 7), [EOS], -1, advantage=-0.5),
        row((*PREFIX, 900), [77, 76, EOS]),
    ]
    block = block_of([(one,) for one in rows], shape(24, ((2, 8), (1, 8)), 6, PREFIX))
    assert describe(block) == textwrap.dedent("""\
        block of micro-batch 0: 5 of 6 rows, 9 of 16 scored tokens

        pack 0: 12 of 24 tokens, 50.0% padding; attention tiles 1 x 3, 2 x 8, 1 x 8, 55.6% padding

          shared prefix, at places 0-2: in front of every tree
            place                 0    1    2
            token               101  102  103
            position              0    1    2
            branch_id             0    0    0
            query_index           0    1    2

          tree 0
            prompt    5 6 7
            branch 1  8 9 [2]    row 0
            branch 2  4 [2]      rows 1-2
            no branch [2]        row 3

            place               3  4  5  6  7  8
            token               5  6  7  8  9  4
            position            3  4  5  6  7  6
            branch_id           0  0  0  1  1  2
            query_index         3  4  5  6  7  8
            5 attends to        x
            6 attends to        x  x
            7 attends to        x  x  x
            8 attends to        x  x  x  x
            9 attends to        x  x  x  x  x
            4 attends to        x  x  x  .  .  x
            and all of them to the shared prefix

          tree 1
            prompt    900
            branch 1  77 76 [2]    row 4

            place                 9   10   11
            token               900   77   76
            position              3    4    5
            branch_id             0    1    1
            query_index          11   12   13
            900 attends to        x
            77 attends to         x    x
            76 attends to         x    x    x
            and all of them to the shared prefix

          padding at places 12-23

        rows
          row 0: label +1, weight 1, advantage 0, loss on completion tokens 0-2 of 3
          row 1: label -1, weight 1, advantage 0, loss on completion tokens 0-1 of 2
          row 2: label -1, weight 1, advantage 0, loss on completion tokens 0-1 of 2
          row 3: label -1, weight 1, advantage -0.5, loss on completion tokens 0 of 1
          row 4: label +1, weight 1, advantage 0, loss on completion tokens 0-2 of 3
          padding: row 5
        """)


def test_a_wide_tree_is_cut_into_tables_and_a_line_a_branch():
    prompt = list(range(10, 40))
    block = block_of(
        [(row(prompt, [77, 76, EOS]),), (row(prompt, [75, 74, EOS]),)], shape(34, ((1, 40),), 2)
    )
    lines = [line.strip() for line in describe(block).splitlines()]
    assert "prompt    10 11 12 13 14 15 ... 34 35 36 37 38 39 (30 tokens)" in lines
    tokens = [int(word) for line in lines if line.startswith("token") for word in line.split()[1:]]
    assert tokens == [*prompt, 77, 76, 75, 74]
    assert [line for line in lines if "its last token" in line] == [
        "branch 0: its last token, at place 29, attends to places 0-29",
        "branch 1: its last token, at place 31, attends to places 0-31",
        "branch 2: its last token, at place 33, attends to places 0-29 32-33",
    ]
    assert not any("padding at" in line for line in lines)  # all 34 places hold a token
    assert max(map(len, describe(block).splitlines())) <= 100


def test_rows_on_two_packs_are_named_in_both():
    student, teacher = row([5, 6], [8, EOS]), row([3, 5, 6], [8, EOS], -1)
    text = describe(block_of([(student, teacher)], shape(8, ((1, 8),), 1, num_packs=2)))
    zero, one = text.split("pack 1")
    assert "prompt    5 6\n" in zero and "prompt    3 5 6\n" in one
    assert "branch 1  8 [2]    rows 0-1" in zero and "branch 1  8 [2]    rows 0-1" in one


def test_crosses_are_what_attention_sees():
    block = two_completions()
    wanted = seen_in_tree(block.packs[0].branch_ids[:1, :6], 6)[0]
    lines = [line.split("to", 1)[1] for line in describe(block).splitlines() if "attends" in line]
    drawn = [[mark == "x" for mark in line.split()] for line in lines]
    assert drawn == [wanted[at, : at + 1].tolist() for at in range(6)]


def test_a_broken_block_says_where():
    block = two_completions()
    block.packs[0].tokens[4] = 55
    assert "!! the pack reads 8 55 at 3-4" in describe(block)
    block.source[0][3] = 9  # where row 1's prompt should end stands padding
    assert "!! row 1: its prompt stands in no tree" in describe(block)


def test_a_stack_of_blocks_is_refused_with_the_remedy():
    stack = jax.tree.map(lambda x: np.asarray(x)[None, None, None], two_completions())
    with pytest.raises(UserError, match=r"leading axes \(1, 1, 1\).*x\[0, 0, 0\]"):
        describe(stack)
    assert describe(jax.tree.map(lambda x: x[0, 0, 0], stack)) == describe(two_completions())
