"""Runs lm-evaluation-harness with one more model, `apc`: a run or a shared result under a policy.

apc lm-eval run --model apc --model_args checkpoint=runs/x,policy=predicted --tasks hellaswag --batch_size 8

Words and options are those of the harness's own command `lm_eval`, which has no plug-ins.
"""

from apc.utils.errors import UserError
from apc.utils.files import FULL
from apc.utils.packages import require_extra


def main() -> None:
    """The command `apc lm-eval`."""
    require_extra("eval")
    from lm_eval.__main__ import cli_evaluate

    import apc.share.harness  # noqa: F401  # registers the model
    from apc.data.loading import reason

    try:
        cli_evaluate()
    except (OSError, ValueError) as error:  # an unknown task, a wrong value, data that can't be fetched
        if isinstance(error, BrokenPipeError) or getattr(error, "errno", None) in FULL:
            raise
        raise UserError(f"lm-eval: {reason(error)}") from error
