"""What changed in transformers 5, for tests of behaviour that only one side has."""

import pytest
import transformers

FOUR = int(transformers.__version__.partition(".")[0]) < 5
needs_five = pytest.mark.skipif(FOUR, reason=f"transformers {transformers.__version__} has not what this is about")
