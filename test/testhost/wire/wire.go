// Package wire is what a test and its test host say to each other: JSON values, one after the other, over a virtio port.
package wire

// Port is the virtio port's name.
const Port = "testhost"

// Command goes in.
type Command struct {
	// Run by bash in /data.
	Script string `json:"script"`
}

// Event comes out.
type Event struct {
	// The first event.
	Ready bool `json:"ready,omitempty"`
	// What the script wrote, both streams.
	Output []byte `json:"output,omitempty"`
	// The script's end.
	Done     bool   `json:"done,omitempty"`
	ExitCode int    `json:"exitCode,omitempty"`
	Error    string `json:"error,omitempty"`
}
