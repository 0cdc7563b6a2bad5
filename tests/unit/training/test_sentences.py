# SPDX-License-Identifier: Apache-2.0
"""The error messages for wrong flags."""

from argparse import ArgumentParser

import pytest


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--hiden-size", "4"], "--hiden-size is not a flag (close to it: --hidden-size"),
        (["--hiden-size=4"], "--hiden-size is not a flag (close to it: --hidden-size"),
        (["--qqqqqqqqqq"], "--qqqqqqqqqq is not a flag; --help lists all flags."),
        (["stray"], "stray belongs to no flag"),
        (["--hidden-size", "four"], "argument --hidden-size: invalid int value: 'four'"),
    ],
)
def test_a_mistyped_flag_is_reported_with_similar_flags_in_one_line_without_usage(capsys, given, said):
    from megatron_smar.config.flag_errors import explain_unknown_flags

    parser = ArgumentParser(prog="pretrain_vlm.py", allow_abbrev=False)
    parser.add_argument("--hidden-size", type=int)
    explain_unknown_flags(parser)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(given)
    output = capsys.readouterr().err
    assert end.value.code == 2 and said in output.splitlines()[-1] and "usage" not in output
