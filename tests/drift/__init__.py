"""`make drift`: does knapper still work with what its neighbours released since its pins were made?"""
