"""Data and compute on Ray: ingest, train, evaluate, sweep, segment, report. Imports `rssnet`, never `workflows`."""
