from ibeton.workers import stop_with_launcher

stop_with_launcher()  # before the imports of a command, which take seconds
