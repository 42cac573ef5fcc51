"""What can go wrong, said in one line: which words of an error are told."""

import pytest

from finetune.errors import SettingsError, blame

LOADING = (
    "Error(s) in loading state_dict for PeftModel:\n"
    "\tsize mismatch for base_model.layers.0.lora_A: [8, 64] and [16, 64]\n"
    "\tsize mismatch for base_model.layers.1.lora_A: [8, 64] and [16, 64]"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("it is broken."), "it is broken"),
        (KeyError("name"), "KeyError('name')"),
        (ValueError("one thing\nand another"), "one thing…"),
        (
            RuntimeError(LOADING),
            "Error(s) in loading state_dict for PeftModel: size mismatch for "
            "base_model.layers.0.lora_A: [8, 64] and [16, 64]…",
        ),
        (ValueError("\nAt last:\n  a reason\n"), "At last: a reason"),
        (ValueError("It ends here:"), "It ends here:"),
    ],
)
def test_the_line_that_says_something_is_told(error, reason):
    with pytest.raises(SettingsError) as told, blame("MODEL_NAME", "mine", "give another"):
        raise error
    assert told.value.args == (f"MODEL_NAME is mine: it can't be used ({reason}): give another",)
