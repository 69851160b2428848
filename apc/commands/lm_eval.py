"""Runs lm-evaluation-harness with one more model, `apc`: a run or a shared result under a policy.

apc lm-eval run --model apc --model_args checkpoint=runs/x,policy=predicted --tasks hellaswag --batch_size 8

Words and options are those of the harness's own command `lm_eval`, which has no plug-ins.
"""

from apc.utils.packages import require_extra


def main() -> None:
    """The command `apc lm-eval`."""
    require_extra("eval")
    from lm_eval.__main__ import cli_evaluate

    import apc.share.harness  # noqa: F401  # registers the model

    cli_evaluate()
