"""What holds for all tests."""

import os
import tempfile

from samplewise import buffers

# rates that the tests measure stay out of the user's own cache
os.environ["SAMPLEWISE_CACHE"] = tempfile.mkdtemp(prefix="samplewise-tests-")
# small blocks are kept and overwritten as large ones are, so that no result is left in one
buffers.SMALLEST = 1
