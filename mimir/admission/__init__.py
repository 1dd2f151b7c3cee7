"""Who may take part: evidence exchanged and judged, certificates for those admitted, and what is revoked."""
