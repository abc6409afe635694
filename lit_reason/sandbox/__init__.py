"""The only place where model-written text may meet code that executes it.

rewards -> Sandbox.score(payloads) -> worker process -> one forked child per payload -> Verdict
"""

from lit_reason.sandbox.pool import PYTHON, Sandbox
from lit_reason.sandbox.verdict import Verdict

__all__ = ["PYTHON", "Sandbox", "Verdict"]
