"""Other people's models. Their names, files and libraries live here and nowhere else; torch and such only lazily."""
