"""The learner on real DeepSpeed: the same steps whatever the ranks, the ZeRO stage and the packing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.cluster import Cluster, Resources
from actors.learner import LearnerGroup
from actors.learner_rank import LearnerOptions, LearnerRank
from actors.ports import Features, Objective
from rlsys.algorithms.objective import PolicyObjective
from rlsys.config import ClusterConfig, LearnerConfig, LoraConfig, TinyPolicy
from rlsys.config_grpo import DppoLoss, KlConfig, M2poLoss, PpoClipLoss
from rlsys.models.dna_llm import sequence_inputs
from rlsys.models.policy import load_policy, new_policy, save_policy
from rlsys.models.tiny import make_tiny_policy
from rlsys.models.weights import read_weights
from rlsys.types import DnaSlot, Prompt, TrainSample

WIDTH = 16
GRPO = Objective(PolicyObjective(DppoLoss(kind="dppo")), learning_rate=1e-3, warmup_steps=2, temperature=1.0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shape = TinyPolicy(kind="tiny", hidden_size=64, layers=2, attention_heads=2)
    model, tokenizer = new_policy(make_tiny_policy(folder / "text", shape), encoder_width=WIDTH)
    save_policy(folder / "policy", model, tokenizer)
    return folder / "policy"


def batch() -> tuple[list[TrainSample], Features]:
    """Twelve samples of uneven lengths in three groups, with one slot each."""
    rng = np.random.default_rng(0)
    features = {f"key-{group}": rng.normal(size=(3, WIDTH)).astype(np.float32) for group in range(3)}
    samples: list[TrainSample] = []
    for number in range(12):
        length = int(rng.integers(3, 20))
        group = number % 3
        prompt = Prompt(f"problem-{group}", (1, 3, 3, 3, 3, 3, 7, 8), (DnaSlot(1, 5, f"key-{group}"),))
        samples.append(
            TrainSample(
                group=group,
                prompt=prompt,
                continuation_ids_T=rng.integers(5, 50, size=length),
                behavior_logprobs_T=rng.normal(-4, 0.1, size=length).astype(np.float32),
                versions_T=np.zeros(length, np.int64),
                loss_mask_T=np.ones(length, np.float32),
                advantage=float(rng.normal()),
                token_weight=1 / 128,
            )
        )
    return samples, features


class Bench:
    """Starts learners on one cluster and drives them; every rank is ended after its test."""

    def __init__(self, policy: Path) -> None:
        self._policy = policy
        self._runner = asyncio.Runner()
        self._cluster = Cluster(ClusterConfig(dashboard=False), 2, 0, None)
        self._runner.run(self._cluster.__aenter__())

    def close(self) -> None:
        self._runner.run(self._cluster.__aexit__(None, None, None))
        self._runner.close()

    def drive(
        self,
        folder: Path,
        script: Callable[[LearnerGroup], Awaitable[Result]],
        lora: LoraConfig | None = None,
        **config: Any,
    ) -> Result:
        """Start a learner and run `script` on it."""
        settings = LearnerConfig.model_validate({"cpus": 0.5, **config})
        options = LearnerOptions(str(self._policy), settings, lora, seed=0, weights_dir=str(folder))

        async def go() -> Result:
            ranks = await asyncio.gather(
                *(
                    self._cluster.place(
                        f"learner {rank} {folder}", LearnerRank, options, rank, resources=Resources(0.5, 0)
                    )
                    for rank in range(settings.ranks)
                )
            )
            try:
                learner = LearnerGroup(ranks, settings, pad_token_id=0)
                await learner.join()
                return await script(learner)
            finally:
                for rank in ranks:
                    self._cluster.kill(rank)

        return self._runner.run(go())


@pytest.fixture(scope="module")
def bench(policy: Path) -> Iterator[Bench]:
    made = Bench(policy)
    yield made
    made.close()


@dataclass(frozen=True)
class Result:
    """What a script saw."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


async def step(learner: LearnerGroup, steps: int, parts: Sequence[slice] = (slice(None),)) -> list[float]:
    samples, features = batch()
    losses: list[float] = []
    for _ in range(steps):
        for part in parts:
            await learner.accumulate(samples[part], [features])
        losses.append((await learner.step()).metrics["train/loss"])
    return losses


async def five_steps(learner: LearnerGroup) -> Result:
    await learner.enter(GRPO)
    return Result(await step(learner, 5), read_weights(await learner.publish()))


@pytest.fixture(scope="module")
def one_rank(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Five steps of one rank, and the folder of what it saved after the third."""
    folder = tmp_path_factory.mktemp("one_rank")

    async def script(learner: LearnerGroup) -> Result:
        await learner.enter(GRPO)
        losses = await step(learner, 3)
        await learner.save(folder)
        return Result(losses + await step(learner, 2), read_weights(await learner.publish()))

    return bench.drive(folder, script, micro_batch_tokens=64), folder


def test_ranks_zero_stage_and_packing_do_not_change_the_steps(
    bench: Bench, tmp_path: Path, one_rank: tuple[Result, Path]
) -> None:
    found = bench.drive(tmp_path, five_steps, micro_batch_tokens=100, ranks=2, zero_stage=3)
    assert found.losses == pytest.approx(one_rank[0].losses, abs=1e-6)
    # AdamW divides by the root of tiny second moments: a rounding error in a gradient can become a part of the step.
    assert _largest_difference(found.weights, one_rank[0].weights) < 1e-4


def test_a_step_in_parts_is_the_step(bench: Bench, tmp_path: Path, one_rank: tuple[Result, Path]) -> None:
    async def script(learner: LearnerGroup) -> Result:
        await learner.enter(GRPO)
        losses = await step(learner, 5, [slice(0, 1), slice(1, 8), slice(8, None)])
        return Result(losses, read_weights(await learner.publish()))

    found = bench.drive(tmp_path, script, micro_batch_tokens=64)
    assert found.losses == pytest.approx(one_rank[0].losses, abs=1e-6)
    assert _largest_difference(found.weights, one_rank[0].weights) < 1e-4


def test_a_restored_learner_goes_on_bit_for_bit(bench: Bench, one_rank: tuple[Result, Path], tmp_path: Path) -> None:
    async def script(learner: LearnerGroup) -> Result:
        await learner.restore(one_rank[1], GRPO, 3)
        return Result(await step(learner, 2), read_weights(await learner.publish()))

    found = bench.drive(tmp_path, script, micro_batch_tokens=64)
    assert found.losses == one_rank[0].losses[3:]
    assert _largest_difference(found.weights, one_rank[0].weights) == 0.0


def engine_logprobs(
    policy: Path, weights: dict[str, torch.Tensor], samples: Sequence[TrainSample], features: Features
) -> list[np.ndarray]:
    """What an engine that loaded published weights gives the tokens of each sample: in their precision, one by one."""
    model = load_policy(policy, dtype=next(iter(weights.values())).dtype)
    found = model.load_state_dict(weights, strict=False)
    assert (found.unexpected_keys, found.missing_keys) == ([], ["language_model.lm_head.weight"])  # tied
    logprobs: list[np.ndarray] = []
    for sample in samples:
        prompt = sample.prompt
        tensors = [torch.from_numpy(features[slot.key]) for slot in prompt.slots]
        inputs = sequence_inputs(prompt.token_ids, prompt.slots, tensors, sample.continuation_ids_T.tolist())
        with torch.no_grad():
            logprobs.append(model(**inputs).logprobs.numpy())
    return logprobs


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_probe_measures_its_samples_and_changes_nothing_in_the_step(
    bench: Bench, policy: Path, tmp_path: Path, ranks: int, zero_stage: int
) -> None:
    samples, features = batch()
    # Only the tokens from the second on are of the version that the learner holds: 2, after two steps.
    probed = [replace(sample, versions_T=np.array([1] + [2] * (len(sample.versions_T) - 1))) for sample in samples[:4]]

    async def script(learner: LearnerGroup) -> Result:
        await learner.enter(GRPO)
        losses = await step(learner, 2)
        version_2 = read_weights(await learner.publish())
        await learner.probe(probed[:1], [features])
        await learner.accumulate(samples[:5], [features])
        await learner.probe(probed[1:], [features])
        await learner.accumulate(samples[5:], [features])
        report = await learner.step()
        assert report.tokens == sum(len(sample.continuation_ids_T) for sample in samples)
        assert not [name for name in report.metrics if name.endswith("staleness_0")]
        expected = np.concatenate([
            np.abs(logprobs_T - sample.behavior_logprobs_T)[1:]
            for logprobs_T, sample in zip(engine_logprobs(policy, version_2, probed, features), probed, strict=True)
        ])  # fmt: skip
        assert report.metrics["train/mismatch_tokens"] == len(expected)
        assert report.metrics["train/mismatch_abs_mean"] == pytest.approx(expected.mean(), rel=1e-4)
        assert report.metrics["train/mismatch_abs_max"] == pytest.approx(expected.max(), rel=1e-4)
        await learner.accumulate(samples, [features])
        after = await learner.step()
        assert after.metrics["train/mismatch_tokens"] == 0
        losses += [report.metrics["train/loss"], after.metrics["train/loss"]]
        return Result(losses + await step(learner, 1), read_weights(await learner.publish()))

    async def without(learner: LearnerGroup) -> Result:
        await learner.enter(GRPO)
        losses = await step(learner, 2)
        losses += await step(learner, 1, [slice(0, 5), slice(5, None)])
        return Result(losses + await step(learner, 2), read_weights(await learner.publish()))

    settings: dict[str, Any] = {"micro_batch_tokens": 64, "ranks": ranks, "zero_stage": zero_stage}
    found, undisturbed = (bench.drive(tmp_path, one, **settings) for one in (script, without))
    assert found.losses == undisturbed.losses
    assert _largest_difference(found.weights, undisturbed.weights) == 0.0


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_said_to_be(
    bench: Bench, tmp_path: Path, precision: str
) -> None:
    samples, features = batch()
    bad = replace(samples[0], behavior_logprobs_T=np.full_like(samples[0].behavior_logprobs_T, np.nan))

    async def script(learner: LearnerGroup) -> Result:
        await learner.enter(GRPO)
        skipped: list[float] = []
        before = read_weights(await learner.publish())
        for first in (bad, samples[0]):
            await learner.accumulate([first, *samples[1:]], [features])
            skipped.append((await learner.step()).metrics["train/step_skipped"])
            after = read_weights(await learner.publish())
            assert (_largest_difference(before, after) == 0) == (first is bad)
        assert learner.version == 2
        return Result(skipped, {})

    assert bench.drive(tmp_path, script, micro_batch_tokens=64, precision=precision).losses == [1.0, 0.0]


@pytest.mark.slow
def test_a_bf16_learner_trains_as_one_in_fp32_and_goes_on_bit_for_bit_after_a_restore(
    bench: Bench, tmp_path: Path, one_rank: tuple[Result, Path]
) -> None:
    async def begin(learner: LearnerGroup) -> Result:
        await learner.enter(GRPO)
        losses = await step(learner, 3)
        await learner.save(tmp_path)
        return Result(losses + await step(learner, 2), read_weights(await learner.publish()))

    async def go_on(learner: LearnerGroup) -> Result:
        await learner.restore(tmp_path, GRPO, 3)
        return Result(await step(learner, 2), read_weights(await learner.publish()))

    whole, restored = (
        bench.drive(tmp_path, script, micro_batch_tokens=64, precision="bf16") for script in (begin, go_on)
    )
    assert {tensor.dtype for tensor in whole.weights.values()} == {torch.bfloat16}
    assert whole.losses == pytest.approx(one_rank[0].losses, abs=0.03)
    assert restored.losses == whole.losses[3:]
    assert _largest_difference(restored.weights, whole.weights) == 0.0


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=8, alpha=16)], ids=["full", "lora"])
@pytest.mark.parametrize(("precision", "bound"), [pytest.param("fp32", 1e-4, marks=pytest.mark.slow), ("bf16", 3e-2)])
def test_published_weights_give_the_log_probabilities_that_the_learner_has(
    bench: Bench, policy: Path, tmp_path: Path, precision: str, bound: float, lora: LoraConfig | None
) -> None:
    samples, features = batch()
    fast = replace(GRPO, learning_rate=1e-2)

    async def script(learner: LearnerGroup) -> Result:
        await learner.enter(fast)
        before = engine_logprobs(policy, read_weights(await learner.publish()), samples, features)
        await step(learner, 5)
        after = engine_logprobs(policy, read_weights(await learner.publish()), samples, features)
        sampled = [
            replace(sample, behavior_logprobs_T=logprobs_T, versions_T=np.full(len(logprobs_T), learner.version))
            for sample, logprobs_T in zip(samples, after, strict=True)
        ]
        await learner.probe(sampled, [features])
        await learner.accumulate(samples, [features])
        mismatch = (await learner.step()).metrics["train/mismatch_abs_mean"]
        return Result([mismatch, float(np.abs(np.concatenate(after) - np.concatenate(before)).mean())], {})

    mismatch, moved = bench.drive(tmp_path, script, lora=lora, micro_batch_tokens=64, precision=precision).losses
    assert mismatch <= bound
    assert moved > 3 * bound, "weights of another version would be found out"


REGULARISED = Objective(
    PolicyObjective(PpoClipLoss(kind="ppo_clip"), kl=KlConfig(weight=0.5), entropy_weight=0.01), 1e-3, 2, 1.0
)


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "lora"),
    [(1, 1, None), pytest.param(2, 3, LoraConfig(rank=4), marks=pytest.mark.slow)],
)
def test_the_reference_is_the_policy_at_the_start_also_after_a_restore(
    bench: Bench, tmp_path: Path, ranks: int, zero_stage: int, lora: LoraConfig | None
) -> None:
    samples, features = batch()

    async def kls(learner: LearnerGroup, steps: int) -> list[float]:
        found: list[float] = []
        for _ in range(steps):
            await learner.accumulate(samples, [features])
            found.append((await learner.step()).metrics["train/reference_kl"])
        return found

    async def begin(learner: LearnerGroup) -> Result:
        await learner.enter(GRPO)
        await step(learner, 2)  # the reference is what is held at `enter`, not what was loaded
        await learner.enter(REGULARISED)
        first = await kls(learner, 2)
        await learner.save(tmp_path)
        return Result(first + await kls(learner, 1), {})

    async def go_on(learner: LearnerGroup) -> Result:
        await learner.restore(tmp_path, REGULARISED, 2)
        return Result(await kls(learner, 1), {})

    settings: dict[str, int] = {"micro_batch_tokens": 64, "ranks": ranks, "zero_stage": zero_stage}
    found = bench.drive(tmp_path, begin, lora=lora, **settings).losses
    assert found[0] == pytest.approx(0, abs=1e-7)
    assert found[2] > found[1] > 1e-6
    assert bench.drive(tmp_path, go_on, lora=lora, **settings).losses == pytest.approx(found[2:], rel=1e-5)


@pytest.mark.slow
def test_a_mask_over_the_whole_step_does_not_depend_on_ranks_and_packing(bench: Bench, tmp_path: Path) -> None:
    objective = Objective(PolicyObjective(M2poLoss(kind="m2po", tau=0.01)), 1e-3, 2, 1.0)

    async def script(learner: LearnerGroup) -> Result:
        await learner.enter(objective)
        samples, features = batch()
        await learner.accumulate(samples, [features])
        report = await learner.step()
        return Result([report.metrics["train/loss"], report.metrics["train/ratio_clipped_fraction"]], {})

    one = bench.drive(tmp_path, script, micro_batch_tokens=64).losses
    two = bench.drive(tmp_path, script, micro_batch_tokens=300, ranks=2).losses
    assert 0 < one[1] < 1, "some tokens are masked"
    assert two == pytest.approx(one, abs=1e-6)


def test_lora_trains_adapters_and_projector_and_publishes_them_merged(
    bench: Bench, policy: Path, tmp_path: Path
) -> None:
    before = dict(load_policy(policy).state_dict())
    after = bench.drive(tmp_path, five_steps, lora=LoraConfig(rank=4), micro_batch_tokens=64).weights
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert not any("norm" in name or "embed_tokens" in name for name in changed), "only linear layers have adapters"


def test_the_batch_of_the_tests_teaches_something(one_rank: tuple[Result, Path]) -> None:
    assert one_rank[0].losses[0] != one_rank[0].losses[2]


def _largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)
