package spec

// Version and Commit say which build this is. The Makefile sets them with -ldflags -X; a plain `go build` is "dev".
var (
	Version = "dev"
	Commit  = "unknown"
)
