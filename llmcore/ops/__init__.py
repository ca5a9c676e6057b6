"""llmcore's ops: functions with torch's meaning, each on the best kernel this machine has."""

from llmcore.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
