"""The engine contract, on a real vLLM engine: the same numbers as the learner's forward, through weight updates too."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch

from rlsys.errors import CheckpointError, RoleError
from rlsys.models.dna_llm import DnaLlm
from rlsys.models.lora import merged_state_dict
from rlsys.models.weights import WeightFile, write_weights
from rlsys.types import FinishReason, Prompt
from tests.rlsys.models.tiny_models import PAD, features, prompt, reference_logprobs, save_tiny, tiny_policy

T = TypeVar("T")
END = 2
# float32 sums in another order; measured 1e-6 to 5e-6 on these models.
EXACT = 1e-5
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}


class Rig:
    """One engine for the whole module, and the policy that it serves now."""

    def __init__(self, directory: Path) -> None:
        from rlsys.models.vllm_plugin import client

        self.client = client
        self.directory = directory
        self.version = 0
        self.serving = tiny_policy(seed=0)
        self.runner = asyncio.Runner()
        self.generated_tokens = 0
        options = client.EngineOptions(
            str(save_tiny(directory / "policy", self.serving)),
            max_model_len=1024,
            max_num_seqs=8,
            kv_cache_bytes=64 << 20,
        )
        self.engine = self.run(client.DnaEngine.start(options, version=0, stat_loggers=[self._count_tokens]))

    def _count_tokens(self, vllm_config: Any, engine_index: int = 0) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        rig = self

        class Logger(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
                if iteration_stats is not None:
                    rig.generated_tokens += iteration_stats.num_generation_tokens

            def log_engine_initialized(self) -> None:
                pass

        return Logger()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def sampling(self, tokens: int, temperature: float = 1.0, seed: int | None = None) -> Any:
        return self.client.SamplingOptions(tokens, temperature, (END,), seed)

    def written(self, model: DnaLlm) -> WeightFile:
        """The next version's file."""
        self.version += 1
        return write_weights(self.directory / f"{self.version}.safetensors", merged_state_dict(model), self.version)

    def load(self, model: DnaLlm) -> None:
        self.run(self.engine.load(self.written(model)))
        self.serving = model

    def assert_exact(self, one: Prompt, arrays: Sequence[Any], sampled: Any, temperature: float = 1.0) -> None:
        expected = reference_logprobs(self.serving, one, arrays, sampled.token_ids_T.tolist(), temperature)
        assert np.abs(sampled.logprobs_T - expected).max() <= EXACT


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        made = Rig(tmp_path_factory.mktemp("engine"))
        yield made
        made.engine.close()
        made.runner.close()


def test_greedy_tokens_and_logprobs_equal_the_transformers_forward(rig: Rig) -> None:
    one, arrays = prompt([40, 17]), [features(40, 1), features(17, 2)]
    sampled = rig.run(rig.engine.generate("greedy", one, arrays, rig.sampling(24, temperature=0.0)))
    rig.assert_exact(one, arrays, sampled)
    ids = sampled.token_ids_T.tolist()
    for t, token in enumerate(ids):
        alternatives = [
            float(reference_logprobs(rig.serving, one, arrays, [*ids[:t], other])[t]) for other in (5, 7, 60)
        ]
        assert reference_logprobs(rig.serving, one, arrays, ids[: t + 1])[t] >= max(alternatives), token


def test_other_features_under_the_same_text_give_another_completion(rig: Rig) -> None:
    one, other = prompt([12], key="one"), prompt([12], key="other")
    first = rig.run(rig.engine.generate("d1", one, [features(12, 1)], rig.sampling(16, 0.0)))
    second = rig.run(rig.engine.generate("d2", other, [features(12, 2)], rig.sampling(16, 0.0)))
    rig.assert_exact(other, [features(12, 2)], second)
    assert first.token_ids_T.tolist() != second.token_ids_T.tolist()


def test_a_prompt_without_dna_equals_the_transformers_forward(rig: Rig) -> None:
    text = Prompt("text", tuple(range(10, 60)), ())
    rig.assert_exact(text, [], rig.run(rig.engine.generate("text", text, [], rig.sampling(16))))


def test_a_group_sends_its_features_once(rig: Rig) -> None:
    one, arrays = prompt([33, 8], key="group"), [features(33, 5), features(8, 6)]
    rig.run(rig.engine.generate("g0", one, arrays, rig.sampling(8)))
    nothing = [np.zeros((len(array), 1), dtype=np.float32) for array in arrays]  # refused, if it were sent

    async def rest() -> list[Any]:
        calls = [rig.engine.generate(f"g{i}", one, nothing, rig.sampling(8, seed=i)) for i in range(1, 4)]
        return await asyncio.gather(*calls)

    for sampled in rig.run(rest()):
        rig.assert_exact(one, arrays, sampled)


def test_features_that_the_engine_has_dropped_are_sent_again(rig: Rig) -> None:
    one, arrays = prompt([9], key="dropped"), [features(9, 7)]
    rig.run(rig.engine.generate("before", one, arrays, rig.sampling(4)))
    rig.run(rig.engine.engine.reset_mm_cache())
    rig.assert_exact(one, arrays, rig.run(rig.engine.generate("after", one, arrays, rig.sampling(4))))


def test_a_sampled_pad_is_an_ordinary_token_at_any_temperature(rig: Rig) -> None:
    one, arrays = prompt([6], key="pad"), [features(6, 8)]

    async def draw() -> list[Any]:
        sampling = [rig.sampling(40, temperature=1.7, seed=seed) for seed in range(24)]
        return await asyncio.gather(
            *(rig.engine.generate(f"pad{i}", one, arrays, options) for i, options in enumerate(sampling))
        )

    drawn = rig.run(draw())
    assert any(PAD in sampled.token_ids_T[:-1] for sampled in drawn)  # about 1 token in 80 is the pad
    for sampled in drawn:
        rig.assert_exact(one, arrays, sampled, temperature=1.7)


def test_a_seed_makes_a_completion_reproducible(rig: Rig) -> None:
    one = Prompt("seeded", tuple(range(20, 40)), ())
    first, second, third = (
        rig.run(rig.engine.generate(f"s{i}", one, [], rig.sampling(12, seed=seed))) for i, seed in enumerate((1, 1, 2))
    )
    assert first.token_ids_T.tolist() == second.token_ids_T.tolist() != third.token_ids_T.tolist()


def test_a_completion_ends_with_its_stop_token_or_at_the_limit(rig: Rig) -> None:
    text = Prompt("stop", tuple(range(10, 30)), ())
    free = rig.run(rig.engine.generate("free", text, [], rig.client.SamplingOptions(10, 0.0, ())))
    assert (free.finish_reason, len(free.token_ids_T)) == (FinishReason.LENGTH, 10)
    stop = int(free.token_ids_T[4])
    length = free.token_ids_T.tolist().index(stop) + 1
    stopped = rig.run(rig.engine.generate("stopped", text, [], rig.client.SamplingOptions(10, 0.0, (stop,))))
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids_T.tolist() == free.token_ids_T.tolist()[:length]


def test_what_the_engine_refuses_is_explained_and_hurts_nobody(rig: Rig) -> None:
    with pytest.raises(RoleError, match="refused"):
        rig.run(rig.engine.generate("long", Prompt("long", (11,) * 2000, ()), [], rig.sampling(4)))
    one = prompt([5], key="stray")
    stray = Prompt("stray", (*one.token_ids, PAD), one.slots)
    with pytest.raises(RoleError, match="more DNA pad tokens"):
        rig.run(rig.engine.generate("stray", stray, [features(5, 1)], rig.sampling(4)))
    rig.assert_exact(
        one, [features(5, 1)], rig.run(rig.engine.generate("fine", one, [features(5, 1)], rig.sampling(4)))
    )


def test_weights_change_in_flight_and_each_token_knows_its_version(rig: Rig) -> None:
    old, new = rig.serving, tiny_policy(seed=11)
    prompts = [prompt([40, 3 + i], seed=i, key=f"flight{i}") for i in range(4)]
    arrays = [[features(40, i), features(3 + i, 50 + i)] for i in range(4)]
    sampling = rig.client.SamplingOptions(800, 1.0, ())

    async def fly() -> list[Any]:
        before = rig.generated_tokens
        tasks = [asyncio.create_task(rig.engine.generate(f"fly{i}", prompts[i], arrays[i], sampling)) for i in range(4)]
        while rig.generated_tokens < before + 100:
            await asyncio.sleep(0.001)
        await rig.engine.load(rig.written(new))
        return await asyncio.gather(*tasks)

    sampled = rig.run(fly())
    rig.serving = new
    for one, rows, result in zip(prompts, arrays, sampled, strict=True):
        first, second = result.version_spans
        assert (first.version, second.version) == (rig.version - 1, rig.version)
        assert (first.start, second.end) == (0, 800)
        ids = result.token_ids_T.tolist()
        by_old, by_new = (reference_logprobs(model, one, rows, ids) for model in (old, new))
        assert np.abs(result.logprobs_T - by_old)[: first.end].max() <= EXACT
        assert np.abs(result.logprobs_T - by_new)[second.start :].max() <= EXACT
        assert np.abs(by_old - by_new).max() > 1.0


def test_weights_of_every_version_are_exact_for_prompts_seen_before(rig: Rig) -> None:
    one, arrays = prompt([40, 9], key="again"), [features(40, 3), features(9, 4)]
    for seed in (21, 22):
        rig.load(tiny_policy(seed=seed))
        sampled = rig.run(rig.engine.generate(f"again{seed}", one, arrays, rig.sampling(12)))
        rig.assert_exact(one, arrays, sampled)
        assert sampled.version_spans == ((rig.version, 0, 12),)


def damaged(weight_file: WeightFile) -> WeightFile:
    content = bytearray(Path(weight_file.path).read_bytes())
    content[-1] ^= 1
    Path(weight_file.path).write_bytes(content)
    return weight_file


def without(model: DnaLlm, name: str) -> list[tuple[str, torch.Tensor]]:
    return [(key, tensor) for key, tensor in merged_state_dict(model) if key != name]


def test_a_refused_weight_file_leaves_the_old_version_serving(rig: Rig) -> None:
    rig.load(tiny_policy(seed=31))
    served = rig.version
    other = tiny_policy(seed=32)
    place = rig.directory / "bad.safetensors"
    norm = "language_model.model.norm.weight"
    bad = {
        "damaged": damaged(rig.written(other)),
        "cannot be read": WeightFile(str(rig.directory / "none"), 9, "0", 0),
        f"lack {norm}": write_weights(place.with_name("lack"), without(other, norm), 9),
        "hold unknown extra": write_weights(
            place.with_name("extra"), [*merged_state_dict(other), ("extra", torch.ones(1))], 9
        ),
        f"{norm} has shape": write_weights(place.with_name("shape"), [*without(other, norm), (norm, torch.ones(7))], 9),
    }
    one, arrays = prompt([40], key="refused"), [features(40, 3)]
    for i, (reason, weight_file) in enumerate(bad.items()):
        with pytest.raises(CheckpointError, match=reason):
            rig.run(rig.engine.load(weight_file))
        sampled = rig.run(rig.engine.generate(f"refused{i}", one, arrays, rig.sampling(6)))
        rig.assert_exact(one, arrays, sampled)
        assert [span.version for span in sampled.version_spans] == [served]


@pytest.mark.parametrize(("skipped", "seed"), [("prefix", 41), ("running", 42), ("encoder", 43)])
def test_each_cache_reset_of_a_weight_update_is_needed(rig: Rig, skipped: str, seed: int) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    engine = rig.engine.engine
    one, arrays = prompt([60, 9], key=f"stale-{skipped}"), [features(60, 3), features(9, 4)]
    new = tiny_policy(seed=seed)

    async def update() -> Any:
        # A request in flight: without the flag, its blocks keep the whole prefix cache from being reset.
        before = rig.generated_tokens
        running = asyncio.create_task(
            rig.engine.generate(f"running-{skipped}", one, arrays, rig.client.SamplingOptions(600, 1.0, ()))
        )
        while rig.generated_tokens < before + 20:
            await asyncio.sleep(0.001)
        weight_file = rig.written(new)
        await engine.pause_generation(mode="keep", clear_cache=False)
        await engine.start_weight_update()
        await engine.update_weights(WeightTransferUpdateRequest(update_info=weight_file._asdict()))
        await engine.finish_weight_update(str(weight_file.version))
        if skipped != "prefix":
            await engine.reset_prefix_cache(reset_running_requests=skipped != "running")
        if skipped != "encoder":
            await engine.reset_encoder_cache()
        await engine.resume_generation()
        late = await rig.engine.generate(f"late-{skipped}", one, arrays, rig.sampling(8, 0.0))
        await running
        return late

    stale = rig.run(update())
    rig.serving = new
    expected = reference_logprobs(new, one, arrays, stale.token_ids_T.tolist())
    assert np.abs(stale.logprobs_T - expected).max() > 0.05
    rig.load(new)
    rig.assert_exact(one, arrays, rig.run(rig.engine.generate(f"fresh-{skipped}", one, arrays, rig.sampling(8))))


def test_slots_are_the_runs_of_pads_in_order() -> None:
    from rlsys.models.vllm_plugin.processing import find_slots

    assert find_slots([7, PAD, PAD, PAD, 7, PAD, PAD], PAD, [3, 2]) == [1, 5]
    assert find_slots([PAD] * 5, PAD, [3, 2]) == [0, 3]
    assert find_slots([7, 8], PAD, []) == []
    for ids, lengths in (([PAD, PAD], [3]), ([PAD, 7, PAD], [2]), ([PAD, PAD, PAD], [2]), ([7], [1])):
        with pytest.raises(ValueError, match=r"slot|more DNA pad"):
            find_slots(ids, PAD, lengths)


def test_version_spans_must_cover_the_completion() -> None:
    from vllm.outputs import WeightVersionSpan

    from rlsys.models.vllm_plugin.client import to_version_spans

    assert to_version_spans([WeightVersionSpan("3", 0, 4), WeightVersionSpan("4", 4, 6)], 6) == ((3, 0, 4), (4, 4, 6))
    for spans, tokens in (([("3", 0, 4)], 5), ([("3", 1, 4)], 4), ([("3", 0, 2), ("4", 3, 4)], 4)):
        with pytest.raises(AssertionError):
            to_version_spans([WeightVersionSpan(*span) for span in spans], tokens)


@pytest.mark.slow
def test_a_killed_front_end_leaves_no_engine_process(rig: Rig, tmp_path: Path) -> None:
    script = """
        import asyncio, multiprocessing, sys, time
        from rlsys.models.vllm_plugin.client import DnaEngine, EngineOptions

        async def main():
            options = EngineOptions(sys.argv[1], max_model_len=64, max_num_seqs=1, kv_cache_bytes=1 << 22)
            engine = await DnaEngine.start(options, version=0)  # kept: vLLM ends an engine that nobody holds
            print("engines", *(child.pid for child in multiprocessing.active_children()), flush=True)
            time.sleep(600)

        if __name__ == "__main__":
            asyncio.run(main())
        """
    path = tmp_path / "front_end.py"
    path.write_text(textwrap.dedent(script))
    root = str(Path(__file__).parents[3])
    front_end = subprocess.Popen(
        [sys.executable, str(path), str(rig.directory / "policy")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": root},
    )  # fmt: skip
    assert front_end.stdout is not None
    pids = next((line.split()[1:] for line in front_end.stdout if line.startswith("engines")), [])
    engines = [psutil.Process(int(pid)) for pid in pids]
    assert engines
    assert all(engine.is_running() for engine in engines)
    front_end.send_signal(signal.SIGKILL)
    front_end.wait()
    _, alive = psutil.wait_procs(engines, timeout=30)
    for process in alive:
        process.kill()
    assert not alive


def test_closing_leaves_no_child_process(rig: Rig) -> None:
    engines = multiprocessing.active_children()
    assert engines
    rig.engine.close()
    for engine in engines:
        engine.join(10)
    assert not any(engine.is_alive() for engine in engines)
