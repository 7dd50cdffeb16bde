"""nano: the small model that ships with the project, its pictures, its training and its evaluation."""
