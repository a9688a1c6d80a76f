// Package server is the gRPC API over Unix sockets and, with certificates, TCP: it knows who calls, refuses what is malformed or forbidden,
// translates a request into a call of the workload manager or the image store, and translates the answer back. It
// decides nothing else.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"buf.build/go/protovalidate"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/audit"
	"github.com/sandboxd/sandboxd/pkg/metrics"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// maxRequestBytes bounds one message of a client: the largest is a CreateWorkload with a big environment; streams
	// of bytes come in pieces of at most 1 MiB.
	maxRequestBytes = 4 << 20
	// maxCallsPerConnection bounds what one connection can make the daemon do at once.
	maxCallsPerConnection = 1024
	// windowBytes is how much of one stream may be under way before its reader has to read: enough to keep a Unix
	// socket busy, little enough to hold for a thousand slow readers.
	windowBytes = 512 << 10
	// keepaliveIdle is how long a connection may be silent before the daemon asks whether anybody is there, and
	// keepaliveTimeout how long it waits for the answer. A peer on the same host that dies is seen at once; this
	// finds one that hangs.
	keepaliveIdle    = 2 * time.Minute
	keepaliveTimeout = 20 * time.Second
	// keepaliveMin is how often a client may ask the same of the daemon.
	keepaliveMin = 10 * time.Second
	// handshakeTimeout is what a client gets to say who it is.
	handshakeTimeout = 10 * time.Second
	// stopGrace is what calls under way get to finish when the daemon stops, before their connections are closed.
	stopGrace = 10 * time.Second
)

// Config is what a Server needs.
type Config struct {
	Log       *zap.Logger
	Workloads Workloads
	Images    Images
	Policy    *policy.Policy
	// Asked what they can do on this host.
	Runtimes map[spec.Isolation]runtime.Runtime
	// What doctor says of networks; nil for nothing.
	NetworkChecks func() []runtime.Check
	Host          Host
	// Who may do what; nil lets everybody do everything who can connect.
	Access *access.Table
	// Of TCP listeners; without it they refuse everybody.
	TLS *TLSFiles
	// Has a line of every call that changes something; nil for none.
	Audit *audit.Log
	// Counts calls; nil counts nothing.
	Metrics *metrics.Metrics
}

// Host is what Info and Doctor tell of the daemon and its host, as main knows it.
type Host struct {
	Version, Commit  string
	StateDir, RunDir string
	// Path of the Unix socket the daemon listens on.
	Socket string
	// "v1", "hybrid" or "v2".
	CgroupMode string
	// Path of the policy file, empty without one.
	PolicyFile string
}

// Server serves the API.
type Server struct {
	Config
	access    atomic.Pointer[access.Table]
	crowd     *crowd
	pipes     *pipes
	grpc      *grpc.Server
	health    *health.Server
	validator protovalidate.Validator

	// Done when Stop begins: ends the calls whose rows in the access table say long.
	stopping context.Context
	stop     context.CancelCauseFunc

	// receivers are the goroutines that receive from a client's stream while its handler sends. They end when their
	// handler has returned; Stop waits for them.
	receivers sync.WaitGroup
}

// New makes a server; Serve makes it answer.
func New(c Config) (*Server, error) {
	validator, err := protovalidate.New()
	if err != nil {
		return nil, fmt.Errorf("cannot make the request validator: %w", err)
	}
	s := &Server{Config: c, validator: validator, health: health.NewServer(), crowd: newCrowd(), pipes: newPipes()}
	s.SetAccess(cmp.Or(c.Access, access.Everybody()))
	s.stopping, s.stop = context.WithCancelCause(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(peerCredentials{tls: c.TLS, crowd: s.crowd, pipes: s.pipes}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.UnaryInterceptor(s.interceptUnary),
		grpc.StreamInterceptor(s.interceptStream),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxConcurrentStreams(maxCallsPerConnection),
		grpc.InitialWindowSize(windowBytes),
		grpc.InitialConnWindowSize(windowBytes),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveIdle, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveMin, PermitWithoutStream: true}),
		// A handler must have returned before Stop does: it may hold a session.
		grpc.WaitForHandlers(true),
	)
	sandboxdv1.RegisterWorkloadServiceServer(s.grpc, &workloadService{Server: s})
	sandboxdv1.RegisterImageServiceServer(s.grpc, &imageService{Server: s})
	sandboxdv1.RegisterPolicyServiceServer(s.grpc, &policyService{Server: s})
	sandboxdv1.RegisterSystemServiceServer(s.grpc, &systemService{Server: s})
	sandboxdv1.RegisterTemplateServiceServer(s.grpc, &templateService{Server: s})
	sandboxdv1.RegisterSnapshotServiceServer(s.grpc, &snapshotService{Server: s})
	for name := range s.grpc.GetServiceInfo() {
		s.health.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	}
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	return s, nil
}

// Serve answers on a Unix listener until Stop; then it returns nil.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("cannot serve on %s: %w", l.Addr(), err)
	}
	return nil
}

// Stop takes no further calls, ends the long ones, lets the others finish for stopGrace and then cuts them off. When it
// returns no handler runs.
func (s *Server) Stop() {
	s.health.Shutdown()
	s.stop(errStopping)
	hard := time.AfterFunc(stopGrace, s.grpc.Stop)
	defer hard.Stop()
	s.grpc.GracefulStop()
	s.receivers.Wait()
}

// call is what every call goes through, in this order. request is nil of a stream.
func (s *Server) call(ctx context.Context, method string, request any, handle func(context.Context) error) (err error) {
	began := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if methods[method].long {
		defer context.AfterFunc(s.stopping, func() { cancel(context.Cause(s.stopping)) })()
	}
	audited := s.beginAudit(ctx, method, request)
	permit, err := s.authorize(ctx, method)
	if err == nil {
		var leave func()
		if leave, err = s.crowd.call(permit.caller.Key()); err == nil {
			defer leave()
		}
	}
	if err == nil {
		ctx = context.WithValue(ctx, permitKey{}, permit)
		if audited != nil {
			ctx = context.WithValue(ctx, auditKey{}, audited)
		}
		err = s.guarded(method, func() error { return handle(ctx) })
	}
	answer := toStatus(ctx, err)
	audited.ended(s.Log, answer)
	s.count(method, answer, request == nil, time.Since(began))
	s.logCall(ctx, method, time.Since(began), err, answer)
	return answer
}

func (s *Server) interceptUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	err = s.call(ctx, info.FullMethod, req, func(ctx context.Context) error {
		if err := s.admit(ctx, info.FullMethod, req); err != nil {
			return err
		}
		resp, err = handler(ctx, req)
		if err == nil {
			auditOf(ctx).answered(resp)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) interceptStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return s.call(stream.Context(), info.FullMethod, nil, func(ctx context.Context) error {
		return handler(srv, &callStream{ServerStream: stream, ctx: ctx, server: s, method: info.FullMethod})
	})
}

// guarded runs fn and turns a panic into an error, so that one call cannot end the daemon. Goroutines of a call need it
// as much as its handler.
func (s *Server) guarded(what string, fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.Metrics.Panic()
			s.Log.Error("panic", zap.String("call", what), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			err = spec.Errorf(spec.KindInternal, "sandboxd met a bug of its own in %s; its log has the details", what)
		}
	}()
	return fn()
}

func (s *Server) count(method string, answer error, stream bool, took time.Duration) {
	if s.Metrics == nil {
		return
	}
	if _, known := methods[method]; !known {
		method = "unknown" // gRPC refuses it before; a caller must not make up values of a label
	}
	s.Metrics.Call(method, codeOf(answer).String(), errorInfo(answer).GetReason(), stream, took)
}

func (s *Server) logCall(ctx context.Context, method string, took time.Duration, err, answer error) {
	caller, _ := callerOf(ctx)
	fields := []zap.Field{
		zap.String("method", method), zap.Duration("took", took),
		zap.String("caller", caller.Key()), zap.Int32("pid", caller.PID),
	}
	if err == nil {
		s.Log.Debug("call", fields...)
		return
	}
	fields = append(fields, zap.Stringer("code", codeOf(answer)), zap.Error(err))
	if isFault(answer) {
		s.Log.Error("call failed", fields...)
		return
	}
	s.Log.Debug("call refused", fields...)
}

// admit lets a message through that is well-formed and that the caller may send. The message must be the first of its
// call, or carry nothing that needs leave.
func (s *Server) admit(ctx context.Context, method string, m any) error {
	if err := s.validate(m); err != nil {
		return err
	}
	return s.auditAdmitted(ctx, method, m.(proto.Message), s.authorizeMessage(ctx, method, m.(proto.Message)))
}

// callStream is a client's stream whose messages are validated, whose first one is authorized, and whose context is the
// call's. Handlers let only the first one say what is to be done.
type callStream struct {
	grpc.ServerStream
	ctx      context.Context
	server   *Server
	method   string
	admitted bool
}

func (c *callStream) Context() context.Context { return c.ctx }

func (c *callStream) SendMsg(m any) error {
	if methods[c.method].on == onRequest { // of others an answer says nothing new, and there may be gigabytes of them
		auditOf(c.ctx).answered(m)
	}
	return c.ServerStream.SendMsg(m)
}

func (c *callStream) RecvMsg(m any) error {
	if err := c.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if c.admitted {
		return c.server.validate(m)
	}
	if err := c.server.admit(c.ctx, c.method, m); err != nil {
		return err
	}
	c.admitted = true
	return nil
}
