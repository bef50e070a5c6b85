"""Models out: a plain Hugging Face folder."""

from pose.modeling.export.folder import export_model, verify_export

__all__ = ["export_model", "verify_export"]
