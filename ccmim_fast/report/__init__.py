"""The report draws what a run saw, and compares runs in one offline HTML page."""
