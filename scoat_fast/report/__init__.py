"""Pages for people: a case, a cohort, a patient over time."""
