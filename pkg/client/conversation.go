package client

import (
	"google.golang.org/grpc"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

type execConversation struct {
	stream grpc.BidiStreamingClient[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]
}

func (c execConversation) recv() (stdout, stderr []byte, exit *sandboxdv1.ProcessExit, err error) {
	r, err := c.stream.Recv()
	return r.GetStdout(), r.GetStderr(), r.GetExit(), err
}

func (c execConversation) stdin(data []byte) error {
	return c.stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Stdin{Stdin: data}})
}

func (c execConversation) closeStdin() error {
	return c.stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_CloseStdin{CloseStdin: &sandboxdv1.CloseStdin{}}})
}

func (c execConversation) resize(size *sandboxdv1.TerminalSize) error {
	return c.stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Resize{Resize: size}})
}

func (c execConversation) signal(name string) error {
	return c.stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Signal{Signal: name}})
}

type attachConversation struct {
	stream grpc.BidiStreamingClient[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]
}

func (c attachConversation) recv() (stdout, stderr []byte, exit *sandboxdv1.ProcessExit, err error) {
	r, err := c.stream.Recv()
	return r.GetStdout(), r.GetStderr(), r.GetExit(), err
}

func (c attachConversation) stdin(data []byte) error {
	return c.stream.Send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Stdin{Stdin: data}})
}

func (c attachConversation) closeStdin() error {
	return c.stream.Send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_CloseStdin{CloseStdin: &sandboxdv1.CloseStdin{}}})
}

func (c attachConversation) resize(size *sandboxdv1.TerminalSize) error {
	return c.stream.Send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Resize{Resize: size}})
}

func (c attachConversation) signal(name string) error {
	return c.stream.Send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Signal{Signal: name}})
}
