import subprocess
import sys
from typing import get_args

from rlsys.algorithms.combinations import WEIGHTS, incompatible
from rlsys.config_grpo import Correction, Loss


def kinds(union: object) -> list[str]:
    return [section.model_fields["kind"].annotation.__args__[0] for section in get_args(get_args(union)[0])]


def test_losses_that_contain_the_weight_already_take_no_other() -> None:
    refused = {(loss, correction) for loss in kinds(Loss) for correction in kinds(Correction)
               if incompatible(loss, correction) is not None}  # fmt: skip
    assert refused == {(loss, weight) for loss in ("dppo", "m2po", "decoupled_ppo") for weight in ("tis", "icepop")}


def test_the_weights_are_corrections_of_the_configuration() -> None:
    assert set(WEIGHTS) < set(kinds(Correction))


def test_the_rules_of_the_configuration_can_ask_without_torch() -> None:
    program = "import rlsys.algorithms.combinations, sys; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("False\n", "")
