"""``report.html``: a run as one page that opens without a network or a server."""
