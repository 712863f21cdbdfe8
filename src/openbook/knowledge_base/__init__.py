"""An embedding in, an answer out: the teacher's answers, stored, searched and mixed with the student's."""
