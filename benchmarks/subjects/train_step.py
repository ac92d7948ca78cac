def rows(suite):
    return []
