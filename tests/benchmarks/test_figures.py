"""The pure parts of the benchmarks: their arithmetic and what they print. The runs themselves are no tests."""

from __future__ import annotations

import json
import os

import pytest
import torch

from rlsys.types import Problem
from tests.benchmarks.controller_speed import groups_per_second
from tests.benchmarks.measured import Measured, pss_mb
from tests.benchmarks.part import PARTS
from tests.benchmarks.table import RATIOS, ratios, render
from tests.benchmarks.trl_attention import CpuFlashAttention
from tests.benchmarks.workload import PROMPT_TOKENS, WordRenderer, even_words, problems


def parts_with(**median_steps: float) -> dict[str, Measured]:
    """Parts by name (`_` for `-`) whose steps have these medians, and other means."""
    return {
        name.replace("_", "-"): Measured(step_seconds=[seconds / 2, seconds, 4 * seconds])
        for name, seconds in median_steps.items()
    }


def test_a_step_is_compared_with_the_slower_of_the_two_roles_alone() -> None:
    found = ratios(parts_with(rlsys_s1=6.0, rollout_alone=2.0, learner_alone=4.0))
    assert found == {"rlsys-s1 / max(rollout-alone, learner-alone)": 6.0 / 4.0}


def test_peers_and_turn_taking_are_compared_by_median_steps() -> None:
    found = ratios(parts_with(rlsys_s1=4.0, rlsys_s0=7.0, trl_async=6.0))
    assert found == {"trl-async / rlsys-s1": 1.5, "rlsys-s0 / rlsys-s1": 1.75}


def test_every_ratio_is_one_of_parts_that_exist() -> None:
    assert {name for ratio in RATIOS for name in (ratio.over, *ratio.under)} <= PARTS.keys()


def test_rates_are_over_all_measured_steps() -> None:
    one = Measured(step_seconds=[1.0, 3.0], trained_tokens=800)
    assert one.per_second(one.trained_tokens) == 200
    assert one.per_second(one.generated_tokens) is None


def test_figures_survive_json() -> None:
    one = Measured(step_seconds=[1.0, 2.5], staleness_max=1.0, bottleneck="the learner", details={"x": 0.5})
    assert Measured.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_the_table_has_a_row_for_each_part_and_a_dash_for_what_a_part_does_not_have() -> None:
    parts = {
        "learner-alone": Measured(step_seconds=[4.0]),
        "rollout-alone": Measured(step_seconds=[2.0]),
        "rlsys-s1": Measured(
            step_seconds=[4.0, 6.0, 5.0], staleness_mean=0.5, staleness_max=1.0, learner_idle=0.25, bottleneck="nobody"
        ),
    }
    header, alone, _, system, *rest = render(parts).splitlines()
    assert "s/step" in header
    assert alone.split()[:2] == ["learner-alone", "4.00"]
    assert alone.split().count("-") == 8  # tokens, idleness, staleness, memory
    # 3 steps of 128 trajectories in 15 s.
    assert system.split()[:4] == ["rlsys-s1", "5.00", "4.00-6.00", "25.6"]
    assert "25%" in system
    assert "0.50 / 1" in system
    assert len(header) == len(alone) == len(system)
    assert "rlsys-s1: nobody" in rest
    assert any(line.strip().startswith("1.25  rlsys-s1 / max(") for line in rest)


def test_the_reward_reads_the_words_that_were_written_and_no_special_tokens() -> None:
    problem = Problem("w", "", (), "", "")
    assert even_words(problem, "w64 w65 w66 <eos3>") == pytest.approx(2 / 3)
    assert even_words(problem, "") == 0.0


def test_prompts_are_64_tokens_and_differ() -> None:
    rendered = [WordRenderer().render(problem).token_ids for problem in problems(3)]
    assert {len(ids) for ids in rendered} == {PROMPT_TOKENS}
    assert len(set(rendered)) == 3


def test_a_controller_rate_leaves_out_the_step_that_fills_the_buffer() -> None:
    # One second for the first step, then half a second for each of 4: 32 groups in each, 2 steps a stretch.
    assert groups_per_second([1.0, 1.5, 2.0, 2.5, 3.0], stretch=2) == [64.0, 64.0]


def test_the_memory_of_this_process_is_found() -> None:
    assert 10 < pss_mb(os.getpid()) < 100_000
    assert pss_mb(2**22 + 1) == 0.0  # above Linux's highest process number


def test_trl_gets_the_attention_that_each_packed_sequence_has_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths_q, lengths_k, heads, key_heads, width = [3, 1, 4], [5, 1, 4], 4, 2, 8

    def packed(lengths: list[int], number: int) -> torch.Tensor:
        return torch.randn(sum(lengths), number, width, generator=generator)

    def edges(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int()

    query, key, value = packed(lengths_q, heads), packed(lengths_k, key_heads), packed(lengths_k, key_heads)
    cu_q, cu_k = edges(lengths_q), edges(lengths_k)
    found = CpuFlashAttention.flash_attn_varlen_func(query, key, value, cu_q, cu_k, 4, 5, causal=True)
    for one in range(3):
        for place in range(lengths_q[one]):
            row = int(cu_q[one]) + place
            first = int(cu_k[one])
            seen = slice(first, first + lengths_k[one] - lengths_q[one] + place + 1)
            for head in range(heads):
                logits = key[seen, head // 2] @ query[row, head] / width**0.5
                assert torch.allclose(found[row, head], logits.softmax(0) @ value[seen, head // 2], atol=1e-6)
