"""What is counted of a framework's source."""

from __future__ import annotations

from ptbench.analysis.source import FRAMEWORKS, code_lines, lines_naming, read_source, used_symbols

TEXT = '''"""A docstring of
two lines."""

import torch
from torch import nn as layers
from torch.nn.functional import relu  # a comment
import os.path


class Model(layers.Module):
    """Another docstring."""

    def forward(self, x):  # devices are not named in code here
        name = "a text that is no docstring"
        x = relu(layers.Linear(2, 3)(x))
        if self.devices > 1:
            torch.distributed.all_reduce(
                x
            )
        return os.path.join(name, x.devices_of)
'''


def test_lines_of_code_are_those_that_are_no_docstring_comment_or_blank() -> None:
    assert sorted(code_lines(TEXT)) == [4, 5, 6, 7, 10, 13, 14, 15, 16, 17, 18, 19, 20]


def test_lines_for_a_second_device_name_what_only_it_needs() -> None:
    assert lines_naming(TEXT, "") == {16, 17}
    assert lines_naming(TEXT, "relu") == {6, 15, 16, 17}


def test_symbols_are_the_frameworks_names_in_full_and_each_once() -> None:
    expected = {
        "torch.nn.Module", "torch.nn.Linear", "torch.nn.functional.relu",
        "torch.distributed.all_reduce",
    }  # fmt: skip
    assert used_symbols(TEXT, ["torch"]) == expected


def test_every_framework_is_counted_with_the_files_it_is_made_of() -> None:
    found = read_source()
    assert found.keys() == FRAMEWORKS.keys()
    for name, source in found.items():
        assert {f"{name}/model.py", f"{name}/backend.py", f"{name}/tuned.py"} <= source.lines.keys()
        assert 0 < source.replica_lines < sum(source.lines.values())
