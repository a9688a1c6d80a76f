// Empty: lets this package declare functions of the runtime without a body.
