//! Whether a JPEG file is whole. Its decoder fills what is missing with grey, as browsers do.

/// Markers that stand alone: TEM and the restart markers.
const ALONE: [u8; 9] = [0x01, 0xd0, 0xd1, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7];
const START_OF_IMAGE: u8 = 0xd8;
const END_OF_IMAGE: u8 = 0xd9;
const START_OF_SCAN: u8 = 0xda;
const RESTART_INTERVAL: u8 = 0xdd;

/// Follows the segments and scans of the first image of a file to its end; whatever comes after that does not count.
///
/// # Errors
/// What is missing.
pub(super) fn must_be_whole(bytes: &[u8]) -> Result<(), String> {
    let cut = |what: &str| format!("the file is cut off {what}: no end-of-image marker");
    let mut frame = Frame::default();
    let (mut at, mut scans) = (2, 0);
    loop {
        // Other bytes between segments are passed over, as decoders do.
        let marker = loop {
            match bytes.get(at..) {
                Some([0xff, marker, ..]) if !matches!(marker, 0 | 0xff) => break *marker,
                Some([_, _, ..]) => at += 1,
                _ => return Err(cut("between its parts")),
            }
        };
        at += 2;
        match marker {
            END_OF_IMAGE if scans > 0 => return Ok(()),
            END_OF_IMAGE => return Err("the file ends before its pixels".into()),
            START_OF_IMAGE => return Err("the image breaks off where another one begins".into()),
            marker if ALONE.contains(&marker) => continue,
            _ => {}
        }
        let length = match bytes.get(at..) {
            Some([high, low, ..]) => usize::from(u16::from_be_bytes([*high, *low])),
            _ => return Err(cut("in a header")),
        };
        let Some(segment) = bytes.get(at + 2..at + length.max(2)) else { return Err(cut("in a header")) };
        at += length.max(2);
        match marker {
            RESTART_INTERVAL => frame.interval = number(segment, 0),
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => frame.read(segment),
            START_OF_SCAN => {
                let (end, restarts) = scan(bytes, at).ok_or_else(|| cut("in its pixels"))?;
                let expected = frame.restarts(segment);
                if restarts < expected {
                    return Err(format!("pixels are missing: {restarts} of {expected} restart markers in a scan"));
                }
                (at, scans) = (end, scans + 1);
            }
            _ => {}
        }
    }
}

/// Where the next marker is that is no part of the compressed data from `at` on, and how many restart markers lie before it.
fn scan(bytes: &[u8], mut at: usize) -> Option<(usize, usize)> {
    let mut restarts = 0;
    loop {
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
        match bytes.get(at + 1)? {
            0xff => at += 1,
            0 => at += 2,
            0xd0..=0xd7 => (at, restarts) = (at + 2, restarts + 1),
            _ => return Some((at, restarts)),
        }
    }
}

fn number(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 2).map_or(0, |pair| usize::from(u16::from_be_bytes([pair[0], pair[1]])))
}

/// What tells how many restart markers a scan has.
#[derive(Default)]
struct Frame {
    height: usize,
    width: usize,
    /// Id and sampling, across and down, of each component.
    components: Vec<(u8, usize, usize)>,
    /// Units between restart markers; 0 for none.
    interval: usize,
}

impl Frame {
    fn read(&mut self, segment: &[u8]) {
        (self.height, self.width) = (number(segment, 1), number(segment, 3));
        let component = |part: &[u8; 3]| (part[0], usize::from(part[1] >> 4).max(1), usize::from(part[1] & 15).max(1));
        self.components = segment.get(6..).unwrap_or_default().as_chunks::<3>().0.iter().map(component).collect();
    }

    /// Restart markers of the scan with this header: one between each two intervals.
    fn restarts(&self, header: &[u8]) -> usize {
        let most = |side: fn(&(u8, usize, usize)) -> usize| self.components.iter().map(side).max().unwrap_or(1);
        let (across, down) = (most(|c| c.1), most(|c| c.2));
        let id = header.get(1).copied().unwrap_or_default();
        let alone = header.first() == Some(&1);
        let one = self.components.iter().find(|component| alone && component.0 == id);
        let units = match one {
            // The blocks of one component alone.
            Some((_, h, v)) => {
                (self.width * h).div_ceil(across).div_ceil(8) * (self.height * v).div_ceil(down).div_ceil(8)
            }
            None => self.width.div_ceil(8 * across) * self.height.div_ceil(8 * down),
        };
        match self.interval {
            0 => 0,
            interval => units.div_ceil(interval).saturating_sub(1),
        }
    }
}
