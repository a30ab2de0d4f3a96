"""Reports: the metrics and predictions of runs in, HTML pages out."""
