"""Pictures of what a run saw, and one offline HTML page that compares runs."""
