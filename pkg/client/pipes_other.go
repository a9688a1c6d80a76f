//go:build !linux

package client

import (
	"context"
	"os"
)

// askForPipes: a daemon runs on Linux, and pipes come from the same host.
func askForPipes(context.Context, string) *pipes { return nil }

func (*pipes) move(_, _ *os.File) (done bool, err error) { return false, nil }
