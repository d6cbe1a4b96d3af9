package server

import (
	"crypto/tls"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Sizes of a connection's buffers, bytes. There may be thousands of connections, each with little to say.
const (
	readBuffer   = 4 << 10
	writeBuffer  = 16 << 10
	maxFromNode  = 256 << 10 // an acknowledgement with 100 failures is far below
	minKeepalive = 10 * time.Second
)

// Health is the health of this controller as grpc.health.v1 knows it: SERVING while it leads.
type Health struct{ *health.Server }

// NewHealth returns the health of v, and follows it. Call it before v.Run.
func NewHealth(v *Server) Health {
	h := Health{health.NewServer()}
	set := func(leading bool) {
		s := healthv1.HealthCheckResponse_NOT_SERVING
		if leading {
			s = healthv1.HealthCheckResponse_SERVING
		}
		h.SetServingStatus("", s)
		h.SetServingStatus(controlv1.ControlService_ServiceDesc.ServiceName, s)
	}
	set(false)
	v.OnLead(set)
	return h
}

// NodeServer is the gRPC server that nodes dial: ControlService and health. The configuration must ask for nodes' certificates (pki.Files.Server).
func (v *Server) NodeServer(c *tls.Config, h Health) *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(paced(credentials.NewTLS(c))), grpc.ForceServerCodecV2(newCodec()),
		grpc.ReadBufferSize(readBuffer), grpc.WriteBufferSize(writeBuffer),
		grpc.MaxRecvMsgSize(maxFromNode), grpc.MaxConcurrentStreams(8),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minKeepalive, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
	)
	controlv1.RegisterControlServiceServer(s, &nodeServer{v: v})
	healthv1.RegisterHealthServer(s, h)
	return s
}

// AdminServer is the gRPC server that operators dial: AdminService, health and reflection. The configuration must ask for administrators' certificates.
func (v *Server) AdminServer(c *tls.Config, h Health) *grpc.Server {
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(c)), grpc.MaxRecvMsgSize(api.MaxMessageBytes), grpc.MaxSendMsgSize(api.MaxMessageBytes))
	controlv1.RegisterAdminServiceServer(s, &adminServer{v: v})
	healthv1.RegisterHealthServer(s, h)
	reflection.Register(s)
	return s
}

// EndStreams ends all nodes' streams, so that the servers can stop: they try another controller, or this one later.
func (v *Server) EndStreams() { v.progress.endAll(errStopping) }
