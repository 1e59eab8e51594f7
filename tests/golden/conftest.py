from tests.apps.conftest import warm

__all__ = ["warm"]
