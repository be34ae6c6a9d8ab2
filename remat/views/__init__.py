"""Plans for the eye and for other tools: charts, a page, a memory snapshot, a trace, a graph. Needs the extra `report`."""
