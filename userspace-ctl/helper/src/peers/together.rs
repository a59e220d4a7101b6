// SPDX-License-Identifier: GPL-2.0

//! All that a helper does with neighbours of its device.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pristine_device::control::Id;
use pristine_image::ImageId;
use pristine_store::peers::Neighbours;

use super::clean::{CleanBlocks, Managed};
use super::exchange;
use super::serve::{Given, PeerServer};
use crate::exit::{Code, Failure};
use crate::log;
use crate::options::Options;
use crate::source::Source;
use crate::stop::{End, Stop};

/// How often it is looked whether a device on which nothing is stale is still there, and means the same image.
const LOOK: Duration = Duration::from_secs(2);

/// The neighbours of a device, and what is given to them.
pub struct Peers {
    /// `None` if nothing can be given: then this machine only takes.
    server: Option<PeerServer>,
    given: Arc<Given>,
    id: Id,
}

impl Peers {
    /// Begins to serve neighbours. What keeps it from that is told, and the helper's work goes on.
    pub fn start(id: Id, name: &str, options: &Options) -> Option<Self> {
        let address = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), options.peers_port);
        let server = Managed::open(name, id)
            .and_then(|device| PeerServer::start(Box::new(device), address, options.peer_limits()));
        let server = match server {
            Ok(server) => {
                log::info(format_args!(
                    "serving blocks to neighbours on {}",
                    server.address()
                ));
                Some(server)
            }
            Err(error) => {
                log::warn(format_args!(
                    "cannot serve neighbours on port {}: {error}",
                    options.peers_port
                ));
                None
            }
        };
        let given = server.as_ref().map(PeerServer::given).unwrap_or_default();
        Some(Peers { server, given, id })
    }

    /// What was given.
    pub fn given(&self) -> Arc<Given> {
        Arc::clone(&self.given)
    }

    /// The neighbours for an image, none of them known yet.
    pub fn neighbours(&self, image: ImageId) -> Arc<Neighbours> {
        let port = self.server.as_ref().map(|server| server.address().port());
        Arc::new(Neighbours::new(image, port))
    }

    /// Serves neighbours of a device on which nothing is stale, until something is or it means another image (`true`), or it is
    /// told to stop.
    ///
    /// # Errors
    ///
    /// The device is gone: [`Code::Gone`].
    pub fn only(&self, name: &str, sources: &[Source], stop: &Stop) -> Result<bool, Failure> {
        if self.server.is_none() {
            return Ok(false);
        }
        let gone = |error| Failure::new(Code::Gone, format!("{name}: {error}"));
        let device = Managed::open(name, self.id).map_err(gone)?;
        let image = device.shape().map_err(gone)?.image;
        let neighbours = self.neighbours(image);
        let over = Stop::default();
        std::thread::scope(|scope| {
            scope.spawn(|| exchange::look_after(&neighbours, sources, Some(&self.given), &over));
            let watched = loop {
                if !stop.sleep(LOOK) {
                    break Ok(false);
                }
                match device.shape().and_then(|now| Ok((now, device.stale()?))) {
                    Ok((now, 0)) if now.image == image => (),
                    Ok(_) => break Ok(true),
                    Err(error) => break Err(gone(error)),
                }
            };
            over.end(End::Asked);
            watched
        })
    }
}
