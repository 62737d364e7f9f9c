"""Numbers from arrays: scores, resampling, intervals and operating points."""
