"""The metrics of papers, one module each: `score` gives each prediction its statistics.

In: predictions (id, key, type, question, prediction, answers). Out: SampleScores, from which evaluate/bootstrap.py
makes an estimate with its interval. Names, summaries and printing are in smolray/config/metrics.py.
"""
