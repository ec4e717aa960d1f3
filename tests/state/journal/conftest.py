from tests.store.emulator import gcs, new_bucket

__all__ = ["gcs", "new_bucket"]
