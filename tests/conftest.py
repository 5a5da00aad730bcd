"""What holds for all tests."""

import os
import tempfile

# rates that the tests measure stay out of the user's own cache
os.environ["SAMPLEWISE_CACHE"] = tempfile.mkdtemp(prefix="samplewise-tests-")
