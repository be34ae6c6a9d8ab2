"""Plans for the eye and for other tools. Charts and the page need the extra `report`; the rest needs nothing."""
