"""The HTML report of a run: charts, accuracy tables, samples. In: the run's folder. Out: one self-contained page."""
